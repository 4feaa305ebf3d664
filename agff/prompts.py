"""Learnable prompts: soft tokens after the content, whose hidden states become the global and fine-grained
embeddings.

M = 1 + K blocks of `tokens_per_prompt` soft tokens, the global block first (our definition). In `input_ids` a
soft token has an id beyond the vocabulary: `vocabulary_size + m * tokens_per_prompt + l`. So prompts travel
through any backbone as ordinary ids: no model code, position index or attention mask needs to know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agff.errors import ConfigError

GLOBAL_TEXT = "overall meaning"
FINE_TEXTS = ("object", "attribute", "relation", "written text", "quantity", "colour", "position", "scene")
"""Short texts whose token embeddings initialise the prompts; further fine prompts reuse them in turn."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How many embeddings an item gets, and how its prompts are built."""

    num_fine: int = 4
    """K, fine-grained embeddings per item; 0 gives one global embedding (plain InfoNCE)."""
    tokens_per_prompt: int = 1
    """Soft tokens of one prompt block; 1 to 4."""

    def __post_init__(self) -> None:
        if self.num_fine < 0:
            raise ConfigError(
                f"prompts.num_fine={self.num_fine} must be >= 0; 0 trains the global embedding alone"
            )
        if not 1 <= self.tokens_per_prompt <= 4:
            raise ConfigError(f"prompts.tokens_per_prompt={self.tokens_per_prompt} must be 1, 2, 3 or 4")

    @property
    def num_vectors(self) -> int:
        """M = 1 + K."""
        return 1 + self.num_fine

    @property
    def num_tokens(self) -> int:
        """Soft tokens appended to every item."""
        return self.num_vectors * self.tokens_per_prompt

    @property
    def texts(self) -> tuple[str, ...]:
        """M initial texts, the global one first."""
        return (GLOBAL_TEXT, *(FINE_TEXTS[k % len(FINE_TEXTS)] for k in range(self.num_fine)))


class PromptedEmbedding(nn.Module):
    """The backbone's token embedding, with the soft tokens as ids from `base.num_embeddings` on."""

    def __init__(self, base: nn.Embedding, num_tokens: int) -> None:
        super().__init__()
        self.base = base
        self.vectors = nn.Parameter(torch.zeros(num_tokens, base.embedding_dim, dtype=base.weight.dtype))

    @property
    def weight(self) -> Tensor:
        """The vocabulary's embedding; transformers looks for it."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., H) embeddings of vocabulary ids and soft-token ids."""
        is_prompt = input_ids >= self.base.num_embeddings
        embedded = self.base(input_ids.masked_fill(is_prompt, 0))
        prompts = nn.functional.embedding((input_ids - self.base.num_embeddings).clamp(min=0), self.vectors)
        return torch.where(is_prompt[..., None], prompts.to(embedded.dtype), embedded)


def initial_vectors(
    config: PromptConfig, tokenize: Callable[[str], list[int]], embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """(M * tokens_per_prompt, H) soft tokens made of the embeddings of `config.texts`.

    Each text's token embeddings are averaged in `tokens_per_prompt` near-equal parts. Blocks that share a
    text (K > 8) differ by rolling the vector, so that no two prompts start equal.

    embed: ids (T,) -> (T, H); under ZeRO-3 the caller gathers the embedding first.
    """
    blocks = []
    for index, text in enumerate(config.texts):
        rows_TH = embed(torch.tensor(tokenize(text))).float()
        parts = torch.tensor_split(rows_TH, config.tokens_per_prompt)
        block_LH = torch.stack([part.mean(dim=0) if len(part) else rows_TH.mean(dim=0) for part in parts])
        turn = max(0, index - 1) // len(FINE_TEXTS)
        blocks.append(block_LH.roll(turn, dims=1))
    return torch.cat(blocks)
