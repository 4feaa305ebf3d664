"""Prompts as rows of the vocabulary: so any program that runs the backbone computes a model's vectors.

A soft token becomes a special token of the tokenizer, and its vector the row of the embedding table with
that token's id. Published tables have rows that no token uses (Qwen2-VL: 279), which are taken first; where
they do not suffice the table grows. Neither changes a vector here, where the ids of prompts begin behind the
whole table (agff/prompts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agff.errors import ConfigError
from agff.prompts import PromptConfig

PROMPT_TOKEN = "<|agff_prompt_"
"""How the special token of a soft token begins; its number and `|>` follow."""


@dataclass(frozen=True, kw_only=True)
class VocabularyPrompts:
    """Where the soft tokens are in a vocabulary, block by block, the global one first."""

    tokens: tuple[str, ...]
    """Special tokens of the tokenizer."""
    ids: tuple[int, ...]
    vocabulary_size: int
    """Rows of the embedding table with them in it."""
    tokens_per_prompt: int
    control_tokens: tuple[str, ...]
    """All special tokens of the tokenizer, these among them."""

    @property
    def global_text(self) -> str:
        """What follows an item that gets the global vector alone, which is the state of its last token."""
        return "".join(self.tokens[: self.tokens_per_prompt])

    @property
    def whole_text(self) -> str:
        """What follows an item that gets all vectors: the states of the tokens `vector_ids`."""
        return "".join(self.tokens)

    @property
    def vector_ids(self) -> list[int]:
        """M ids, of the last token of each block."""
        return list(self.ids[self.tokens_per_prompt - 1 :: self.tokens_per_prompt])

    def put_into(self, table_VH: Tensor, vectors_PH: Tensor) -> Tensor:
        """The table, which has `vocabulary_size` rows or more, with the soft tokens put into it in place."""
        table_VH[list(self.ids)] = vectors_PH.to(table_VH)
        return table_VH


def add_to_vocabulary(tokenizer: Any, model_config: Any, prompts: PromptConfig) -> VocabularyPrompts:
    """Give the tokenizer a special token for each soft token, unless it has them from an earlier stage, and
    the configuration the number of rows that its ids need. Raises ConfigError when one of the ids
    means something else in the configuration."""
    from transformers import AddedToken

    tokens = tuple(f"{PROMPT_TOKEN}{index}|>" for index in range(prompts.num_tokens))
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    if taken := set(ids) & set(_special_ids(model_config.to_dict())):
        raise ConfigError(
            f"the tokenizer has no token for {sorted(taken)}, which mean something in the backbone's "
            "config.json, so the prompts would get these ids; add the missing tokens to the tokenizer of "
            "backbone.path"
        )
    text_config = model_config.get_text_config()
    text_config.vocab_size = max(text_config.vocab_size, *(token_id + 1 for token_id in ids))
    return VocabularyPrompts(
        tokens=tokens,
        ids=ids,
        vocabulary_size=text_config.vocab_size,
        tokens_per_prompt=prompts.tokens_per_prompt,
        control_tokens=tuple(
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        ),
    )


def _special_ids(values: Any) -> Iterator[int]:
    """Of `image_token_id`, `eos_token_id`, `image_token_index` and the like, at any depth."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("_token_id", "_token_index")):
            yield from value if isinstance(value, list) else [value]
