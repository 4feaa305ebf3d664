"""Examples -> batch: their distinct items cut into chunks, each through the backbone's processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agff.batch import Batch, Item, ProcessItems, SkippedSample
from data_pipeline.decode import Example


@dataclass(frozen=True, kw_only=True)
class FixedRows:
    """Chunks of equally many rows of similar length, the longest first; the last may have fewer."""

    rows: int

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the rows of each chunk. lengths: tokens of each row."""
        order = _longest_first(lengths)
        return [order[start : start + self.rows] for start in range(0, len(order), self.rows)]


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Chunks of rows of similar length, as many as fit: rows times the longest row is at most `max_tokens`,
    and no row is shorter than half of the longest.

    Short texts come many at a time and large images few, so memory is even and little is padding. The blank
    image of a chunk of texts is not counted.
    """

    max_tokens: int

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the rows of each chunk, the longest first. lengths: tokens of each row."""
        order = _longest_first(lengths)
        chunks = []
        while order:
            longest = max(1, lengths[order[0]])
            fitting = order[: max(1, self.max_tokens // longest)]
            chunks.append([row for row in fitting if 2 * lengths[row] >= longest] or fitting)
            order = order[len(chunks[-1]) :]
        return chunks


Chunking = FixedRows | TokenBudget
"""Rows are cut in the order of their lengths: little is padding, and as every rank holds the same share of
each source, the k-th chunks of all ranks cost alike. The ranks agree on the number of chunks (agff/step.py).
"""


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def collate(
    examples: Sequence[Example],
    process: ProcessItems,
    *,
    chunking: Chunking,
    skipped: Sequence[SkippedSample] = (),
) -> Batch:
    """The local pairs of one step. An item that occurs several times becomes one row, whichever sides it is
    on; the same image with another region or caption is another item.

    Raises DataError when an item does not fit the backbone, or content ids do not say what is equal.
    """
    negatives = [
        negative
        for example in examples
        for negative in zip(example.negatives, example.negative_ids, strict=True)
    ]
    rows, row_of_item = _distinct(
        [
            *((example.query, example.query_id) for example in examples),
            *((example.target, example.target_id) for example in examples),
            *negatives,
        ]
    )
    chunks = chunking.cut([process.num_tokens(row) for row in rows])
    place = {row: place for place, row in enumerate(row for chunk in chunks for row in chunk)}
    return Batch(
        chunks=tuple(process([rows[row] for row in chunk]) for chunk in chunks),
        row_of_item_R=torch.tensor([place[row] for row in row_of_item]),
        query_ids_B=torch.tensor([example.query_id for example in examples]),
        target_ids_B=torch.tensor([example.target_id for example in examples]),
        negative_ids_N=torch.tensor([content_id for _, content_id in negatives], dtype=torch.int64),
        addresses=tuple(example.address for example in examples),
        filler=process([Item(text="")]),
        pair_data=pair_data_of(examples),
        skipped=tuple(skipped),
    )


def _distinct(items: Sequence[tuple[Item, int]]) -> tuple[list[Item], list[int]]:
    """(items of different content, which of them each given item is). items: with their content ids."""
    row_of_key: dict[Any, int] = {}
    rows: list[Item] = []
    row_of_item = []
    for item, content_id in items:
        row = row_of_key.setdefault((content_id, item.box, item.caption), len(rows))
        row_of_item.append(row)
        if row == len(rows):
            rows.append(item)
        elif (item.text, _size(item)) != (rows[row].text, _size(rows[row])):
            raise item.error(
                f"has the content id {content_id} of another item ({rows[row].address}), whose text or "
                "image size is another; equal ids must mean equal content: check the shards with "
                "launcher/verify.py --deep, and prepare them again"
            )
    return rows, row_of_item


def pair_data_of(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """What comes with the pairs, by name, with the pair as first axis."""
    data = {
        name: torch.tensor([example.pair_data[name] for example in examples])
        for name in examples[0].pair_data
    }
    if examples[0].vectors is not None:
        vectors = [np.asarray(example.vectors, dtype=np.float32) for example in examples]
        vectors_B2E = torch.from_numpy(np.stack(vectors))
        data["query_teacher"], data["target_teacher"] = (side.contiguous() for side in vectors_B2E.unbind(1))
    return data


def _size(item: Item) -> tuple[int, int] | None:
    return item.image.size if item.image is not None else None
