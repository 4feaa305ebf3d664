"""What chunks cost before anything runs: padding, and ranks that wait for each other.

The unit is a token that the language model computes: a chunk costs its rows times its longest row. Attention,
which grows faster, and the images' own encoder are left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from agff.batch import Item, ProcessItems
from agff.errors import DataError
from agff.images import SHARD_FORMATS, read_header
from data_pipeline.collate import Chunking
from data_pipeline.plan import Plan
from data_pipeline.reader import NOT_A_RECORD, PAIR_ROLES, RawSample, ShardReader
from data_pipeline.regions import first_region, sides_of

MOST_STEPS = 100
"""That are measured before a run."""
MOST_PAIRS = 1024
"""That are read for it: about a second."""


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

    @classmethod
    def of_step(cls, lengths: Sequence[Sequence[int]], chunking: Chunking) -> Balance:
        """lengths: for each rank, the tokens of each of its distinct items."""
        costs = [
            [len(chunk) * max(own[row] for row in chunk) for chunk in chunking.cut(own)] for own in lengths
        ]
        num_chunks = max(map(len, costs))
        in_turn = [max(cost[k] for cost in costs if k < len(cost)) for k in range(num_chunks)]
        return cls(
            num_tokens=sum(map(sum, lengths)),
            num_padded=sum(map(sum, costs)),
            until_slowest_rank=len(costs) * max(map(sum, costs)),
            until_slowest_chunk=len(costs) * sum(in_turn),
        )

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


@dataclass(frozen=True, kw_only=True)
class MeasuredBalance:
    """Balance of a run's first steps."""

    balance: Balance
    num_steps: int
    num_ranks: int
    """Of which the rows were read: all of them, unless a global batch is larger than MOST_PAIRS."""


def measure_balance(
    plan: Plan,
    reader: ShardReader,
    process: ProcessItems,
    chunking: Chunking,
    *,
    world_size: int,
    num_steps: int,
    with_negatives: bool,
    limit_s: float,
) -> MeasuredBalance | None:
    """Of the first steps, from texts and image headers, up to MOST_STEPS of them and MOST_PAIRS; None when
    not one step was read within `limit_s`.

    A sample that cannot be used is left out. Raises StorageError when a shard cannot be read.
    """
    deadline = time.monotonic() + limit_s
    local = plan.description["global_batch_size"] // world_size
    num_ranks = min(world_size, max(2, MOST_PAIRS // local))
    last = min(num_steps, MOST_STEPS, max(1, MOST_PAIRS // (local * num_ranks)))
    total, measured = Balance(), 0
    for step in range(last):
        lengths = []
        for rank in range(num_ranks):
            rows = plan.rank_rows(step, rank=rank, world_size=world_size)
            samples = ((plan.source_names[source], int(sample)) for source, sample in rows)
            own = _lengths(samples, reader, process, with_negatives=with_negatives)
            lengths.append(list(itertools.takewhile(lambda _: time.monotonic() < deadline, own)))
        if time.monotonic() >= deadline or not all(lengths):
            break
        total, measured = total + Balance.of_step(lengths, chunking), measured + 1
    return MeasuredBalance(balance=total, num_steps=measured, num_ranks=num_ranks) if measured else None


def _lengths(
    samples: Iterable[tuple[str, int]], reader: ShardReader, process: ProcessItems, *, with_negatives: bool
) -> Iterator[int]:
    """Tokens of each distinct item of a rank's samples."""
    seen: set[object] = set()
    for source, sample in samples:
        try:
            raw = reader.read(source, sample)
            found = [
                (int(side["id"]), process.num_tokens(_outline(raw, role, side)))
                for role, side in sides_of(raw.record, first_region).items()
                if with_negatives or role in PAIR_ROLES
            ]
        except (DataError, LookupError, *NOT_A_RECORD):  # training draws another one
            continue
        for content_id, length in found:
            if content_id not in seen:
                yield length
            seen.add(content_id)


def _outline(raw: RawSample, role: str, side: Mapping[str, Any]) -> Item:
    """The item with a blank image of its size."""
    image = raw.images.get(role)
    size = read_header(image.content, image.address, formats=SHARD_FORMATS).size if image else None
    return Item(text=side["text"], image=Image.new("1", size) if size else None)
