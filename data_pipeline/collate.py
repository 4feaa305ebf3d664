"""Examples -> batch: their items cut into chunks, each through the backbone's processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agff.batch import Batch, Item, ProcessItems, SkippedSample
from data_pipeline.decode import Example


@dataclass(frozen=True, kw_only=True)
class FixedRows:
    """Chunks of equally many items, in order: queries, targets, explicit negatives."""

    rows: int

    def cut(self, items: Sequence[Item], process: ProcessItems) -> list[list[int]]:
        """Indices of the items of each chunk."""
        return [
            list(range(start, min(start + self.rows, len(items))))
            for start in range(0, len(items), self.rows)
        ]


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Chunks of items of similar length, as many as fit: rows times the longest row is at most `max_tokens`.

    Short texts come many at a time and large images few, so memory is even and little is padding. The blank
    image of a chunk of texts is not counted.
    """

    max_tokens: int

    def cut(self, items: Sequence[Item], process: ProcessItems) -> list[list[int]]:
        """Indices of the items of each chunk, the longest first."""
        lengths = [process.num_tokens(item) for item in items]
        order = sorted(range(len(items)), key=lambda index: -lengths[index])
        chunks = []
        while order:
            rows = max(1, self.max_tokens // max(1, lengths[order[0]]))
            chunks.append(order[:rows])
            order = order[rows:]
        return chunks


Chunking = FixedRows | TokenBudget


def collate(
    examples: Sequence[Example],
    process: ProcessItems,
    *,
    chunking: Chunking,
    skipped: Sequence[SkippedSample] = (),
) -> Batch:
    """The local pairs of one step. Raises DataError when an item does not fit the backbone."""
    negatives = [(example.negative, example.negative_id) for example in examples if example.negative]
    items = [
        *(example.query for example in examples),
        *(example.target for example in examples),
        *(item for item, _ in negatives),
    ]
    chunks = chunking.cut(items, process)
    position = {item: row for row, item in enumerate(index for chunk in chunks for index in chunk)}
    return Batch(
        chunks=tuple(process([items[index] for index in chunk]) for chunk in chunks),
        row_of_item_R=torch.tensor([position[index] for index in range(len(items))]),
        query_ids_B=torch.tensor([example.query_id for example in examples]),
        target_ids_B=torch.tensor([example.target_id for example in examples]),
        negative_ids_N=torch.tensor([content_id for _, content_id in negatives], dtype=torch.int64),
        addresses=tuple(example.address for example in examples),
        filler=process([Item(text="")]),
        skipped=tuple(skipped),
    )
