"""What chunks cost before anything runs: padding, and ranks that wait for each other.

The unit is a token that the language model computes: a chunk costs its rows times its longest row. Attention,
which grows faster, and the images' own encoder are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.collate import Chunking


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Tokens of some steps, summed over all ranks."""

    num_tokens: int = 0
    """Without padding."""
    num_padded: int = 0
    """As computed, padding included."""
    until_slowest_rank: int = 0
    """As if every rank computed as many as the one with the most in the step."""
    until_slowest_chunk: int = 0
    """As if every rank computed as many as the one with the most in the first chunk, the second, ..."""

    def __add__(self, other: Balance) -> Balance:
        return Balance(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def padding_share(self) -> float:
        """Of the computed tokens, those that are padding."""
        return 1 - self.num_tokens / self.num_padded

    def imbalance(self, *, zero_stage: int) -> float:
        """Time of a step relative to one in which no rank waits; 1 is best. (Our definition.)

        Ranks wait for each other once a step; under ZeRO-3, where a forward is a collective, in every chunk.
        """
        return (self.until_slowest_chunk if zero_stage == 3 else self.until_slowest_rank) / self.num_padded


def balance_of_step(lengths: Sequence[Sequence[int]], chunking: Chunking) -> Balance:
    """lengths: for each rank, the tokens of each of its distinct items."""
    costs = [[len(chunk) * max(own[row] for row in chunk) for chunk in chunking.cut(own)] for own in lengths]
    num_chunks = max(map(len, costs))
    in_turn = [max(cost[k] for cost in costs if k < len(cost)) for k in range(num_chunks)]
    return Balance(
        num_tokens=sum(map(sum, lengths)),
        num_padded=sum(map(sum, costs)),
        until_slowest_rank=len(costs) * max(map(sum, costs)),
        until_slowest_chunk=len(costs) * sum(in_turn),
    )
