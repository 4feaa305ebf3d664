"""Which candidates become a query's negatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agff.errors import ConfigError
from agff.negatives import hardest_negative_mask


@dataclass(frozen=True, kw_only=True)
class MiningRules:
    """Of the candidates of a query, ordered by similarity, its positives left out."""

    num_negatives: int
    """k, of each query at most."""
    skip_ranks: int
    """The most similar ones, which are left out: they may be true answers that nobody marked."""
    max_rank: int
    """The last one that is looked at, counted from 1."""
    margin: float | None
    """A candidate that is more than this above the positive is taken for a true answer (UniME,
    `agff.hardest_negative_mask`); in units of the fused similarity. None: no such rule."""

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ConfigError(f"--num_negatives {self.num_negatives} must be >= 1")
        if self.skip_ranks < 0:
            raise ConfigError(f"--skip_ranks {self.skip_ranks} must be >= 0")
        if self.max_rank < self.skip_ranks + self.num_negatives:
            raise ConfigError(
                f"--max_rank {self.max_rank} leaves fewer than --num_negatives {self.num_negatives} behind "
                f"--skip_ranks {self.skip_ranks}; give at least {self.skip_ranks + self.num_negatives}"
            )


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The best candidates of B queries, the most similar first, of equal ones that with the lower index."""

    index_BR: Tensor
    """int64; -1 where there is none any more."""
    similarity_BR: Tensor
    """-inf where there is none."""
    positive_B: Tensor
    """Similarity of each query to its own positive."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The negatives of B queries."""

    index_BK: Tensor
    """int64, the most similar first; -1 behind the last."""
    similarity_BK: Tensor
    dropped: Mapping[str, int]
    """Candidates by the rule that left them out."""


def choose(ranked: Ranked, rules: MiningRules, *, num_allowed_B: Tensor) -> Chosen:
    """Negatives by the rules. num_allowed_B: candidates of each query that are no positives of it."""
    num_queries, num_ranks = ranked.index_BR.shape
    place_R = torch.arange(num_ranks)
    there_BR = ranked.index_BR >= 0
    looked_at_BR = there_BR & (place_R >= rules.skip_ranks)
    # the positive is candidate 0 of its row
    similarity_BC = torch.cat([ranked.positive_B[:, None], ranked.similarity_BR], dim=1)
    allowed_BC = torch.cat([torch.ones(num_queries, 1, dtype=torch.bool), looked_at_BR], dim=1)
    positive_B = torch.zeros(num_queries, dtype=torch.int64)
    within_BC = hardest_negative_mask(
        similarity_BC, positive_B, margin=rules.margin, num_hardest=None, negative_mask_BC=allowed_BC
    )
    kept_BC = hardest_negative_mask(
        similarity_BC,
        positive_B,
        margin=rules.margin,
        num_hardest=rules.num_negatives,
        negative_mask_BC=allowed_BC,
    )
    # kept ones to the front, in their order
    order_BK = (~kept_BC[:, 1:]).int().sort(dim=1, stable=True).indices[:, : rules.num_negatives]
    is_kept_BK = kept_BC[:, 1:].gather(1, order_BK)
    return Chosen(
        index_BK=ranked.index_BR.gather(1, order_BK).masked_fill(~is_kept_BK, -1),
        similarity_BK=ranked.similarity_BR.gather(1, order_BK).masked_fill(~is_kept_BK, -torch.inf),
        dropped={
            "skip_ranks": int((there_BR & (place_R < rules.skip_ranks)).sum()),
            "max_rank": int((num_allowed_B - rules.max_rank).clamp(min=0).sum()),
            "margin": int(looked_at_BR.sum() - within_BC.sum()),
        },
    )
