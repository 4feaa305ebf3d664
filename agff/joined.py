"""Several chunks encoded as one: in pass 1, which keeps no graph, there is room for more rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from agff.batch import Encoded, ModelInputs
from agff.shared_images import FEATURE_ROWS

ALONG_TOKENS = ("input_ids", "position_ids")
"""Inputs whose last axis is the tokens; padding is 0 (agff/processor.py)."""


PADDING = 0.8
"""The narrowest of joined chunks has at least this share of the widest one's tokens a row."""


def groups_of(sizes: Sequence[tuple[int, int]], num_at_once: int) -> list[slice]:
    """Which neighbouring chunks are encoded at once: at most that many, of similar widths, and never more
    tokens, padding included, than that many of the largest chunk. sizes: rows and padded length of each."""
    most_tokens = num_at_once * max((rows * width for rows, width in sizes), default=0)
    groups: list[slice] = []
    for index, (rows, width) in enumerate(sizes):
        if groups:
            group = sizes[groups[-1]]
            widths = [width, *(other for _, other in group)]
            num_tokens = (rows + sum(other for other, _ in group)) * max(widths)
            if (
                len(group) < num_at_once
                and min(widths) >= PADDING * max(widths)
                and num_tokens <= most_tokens
            ):
                groups[-1] = slice(groups[-1].start, index + 1)
                continue
        groups.append(slice(index, index + 1))
    return groups


def split_into(groups: Sequence[slice], num_groups: int) -> list[slice]:
    """As many groups as the rank that has most of them: the largest are cut in two."""
    groups = list(groups)
    while len(groups) < num_groups:
        place = max(range(len(groups)), key=lambda index: groups[index].stop - groups[index].start)
        start, stop = groups[place].start, groups[place].stop
        middle = (start + stop) // 2
        groups[place : place + 1] = [slice(start, middle), slice(middle, stop)]
    return groups


def join_chunks(chunks: Sequence[ModelInputs], family: Any) -> ModelInputs:
    """The rows of several chunks as one chunk, wherever its tensors are.

    family: `agff.family.Family` of the backbone."""
    width = max(chunk["input_ids"].shape[1] for chunk in chunks)

    def padded(chunk: ModelInputs, name: str) -> Tensor:
        missing = width - chunk["input_ids"].shape[1] if name in ALONG_TOKENS else 0
        return functional.pad(chunk[name], (0, missing)) if missing else chunk[name]

    names = [name for name in chunks[0] if name != FEATURE_ROWS]
    joined = {name: torch.cat([padded(chunk, name) for chunk in chunks]) for name in names}
    if any(FEATURE_ROWS in chunk for chunk in chunks):
        joined[FEATURE_ROWS] = _joined_feature_rows(chunks, family)
    return joined


def encode_joined(
    encode: Callable[[ModelInputs], Encoded], chunks: Sequence[ModelInputs], family: Any
) -> list[Encoded]:
    """What the model says of each chunk, from one forward of all."""
    if len(chunks) == 1:
        return [encode(chunks[0])]
    together = encode(join_chunks(chunks, family))
    sizes = [len(chunk["input_ids"]) for chunk in chunks]
    parts = {name: tensor.split(sizes) for name, tensor in together.items()}
    return [{name: rows[index] for name, rows in parts.items()} for index in range(len(chunks))]


def _joined_feature_rows(chunks: Sequence[ModelInputs], family: Any) -> Tensor:
    """Each chunk counts from its own first image token on; one that shares no image has them in order."""
    rows, before = [], 0
    for chunk in chunks:
        num_tokens = sum(family.num_image_tokens(chunk))
        own = chunk.get(FEATURE_ROWS)
        if own is None:
            own = torch.arange(num_tokens, device=chunk["input_ids"].device)
        rows.append(own + before)
        before += num_tokens
    return torch.cat(rows)
