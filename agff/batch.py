"""What one step consumes: items (text and image), the backbone's inputs for a chunk of items, and the batch of chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

IMAGE_PLACEHOLDER = "<|image_1|>"
"""Where the image stands in a text, whatever the backbone; MMEB's own spelling."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to embed. `text` holds IMAGE_PLACEHOLDER exactly once when there is an image, never otherwise."""

    text: str
    image: Image.Image | None = None


ModelInputs = Mapping[str, Tensor]
"""Keyword arguments of the backbone for one chunk of rows, plus `prompt_start_B` (agff/processor.py)."""

EncodeItems = Callable[[Sequence[Item]], ModelInputs]
"""Items -> inputs of one chunk. Raises DataError for an item it cannot represent."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The local rows of one step, already cut into chunks: row i of the queries belongs to row i of the targets.

    The number of chunks and of rows per chunk follow from the configuration alone, so they are the same on every rank.
    """

    query_chunks: tuple[ModelInputs, ...]
    target_chunks: tuple[ModelInputs, ...]
    query_ids_B: Tensor
    """int64 content ids: equal ids mean equal text and image bytes."""
    target_ids_B: Tensor
    addresses: tuple[str, ...]
    """One `shard.tar:key` a row."""
    skipped: tuple[str, ...] = ()
    """Samples that could not be decoded and were redrawn for this batch: `shard.tar:key: reason`."""

    def __post_init__(self) -> None:
        num_rows = self.query_ids_B.shape[0]
        if self.target_ids_B.shape[0] != num_rows or len(self.addresses) != num_rows:
            raise ValueError(
                f"{num_rows} query ids, {self.target_ids_B.shape[0]} target ids, {len(self.addresses)} addresses"
            )

    @property
    def num_rows(self) -> int:
        """B, the rows on this rank."""
        return self.query_ids_B.shape[0]

    @property
    def num_tokens(self) -> int:
        """Real (unpadded) tokens of all queries and targets of this rank."""
        return sum(int(chunk["attention_mask"].sum()) for chunk in (*self.query_chunks, *self.target_chunks))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by torch's DataLoader."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied asynchronously from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            query_chunks=tuple({name: move(x) for name, x in chunk.items()} for chunk in self.query_chunks),
            target_chunks=tuple({name: move(x) for name, x in chunk.items()} for chunk in self.target_chunks),
            query_ids_B=move(self.query_ids_B),
            target_ids_B=move(self.target_ids_B),
        )
