"""Examples -> batch: cut into chunks, each through the backbone's processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agff.batch import Batch, EncodeItems, Item, ModelInputs
from data_pipeline.decode import Example


def collate(
    examples: Sequence[Example], encode_items: EncodeItems, *, chunk_size: int, skipped: Sequence[str] = ()
) -> Batch:
    """The local rows of one step. chunk_size divides their number, so all ranks have equal chunks."""
    if len(examples) % chunk_size:
        raise ValueError(f"{len(examples)} rows in chunks of {chunk_size}")

    def chunks(items: Sequence[Item]) -> tuple[ModelInputs, ...]:
        return tuple(encode_items(items[start : start + chunk_size]) for start in range(0, len(items), chunk_size))

    return Batch(
        query_chunks=chunks([example.query for example in examples]),
        target_chunks=chunks([example.target for example in examples]),
        query_ids_B=torch.tensor([example.query_id for example in examples]),
        target_ids_B=torch.tensor([example.target_id for example in examples]),
        addresses=tuple(example.address for example in examples),
        skipped=tuple(skipped),
    )
