"""What one step consumes: items (text and image), the backbone's inputs for a chunk of items, and the batch
of chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

IMAGE_PLACEHOLDER = "<|image_1|>"
"""Where the image stands in a text, whatever the backbone; MMEB's own spelling."""


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Image files that are opened at all: Pillow would hand others, such as EPS, to a program of the machine."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to embed. `text` holds IMAGE_PLACEHOLDER exactly once when there is an image, never
    otherwise."""

    text: str
    image: Image.Image | None = None


ModelInputs = Mapping[str, Tensor]
"""Keyword arguments of the backbone for one chunk of rows, plus `prompt_start_B` (agff/processor.py)."""


class ProcessItems(Protocol):
    """Items -> inputs of one chunk (`agff.processor.ItemProcessor`). Raises DataError for an item it cannot
    represent."""

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        """Inputs of the items as the rows of one chunk."""

    def num_tokens(self, item: Item) -> int:
        """Length of the item's row, known without encoding it."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used."""

    source: str
    reason: str
    """Starts with the address, `shard.tar:key`."""


NO_CONTENT = -1
"""In place of a content id: nothing stands here. Real ids are not negative."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The local pairs of one step. Their R = 2 B + N items (queries, targets, explicit negatives) are cut
    into chunks."""

    chunks: tuple[ModelInputs, ...]
    row_of_item_R: Tensor
    """int64: where item i stands among the rows of all chunks; items are the B queries, the B targets, the N
    negatives."""
    query_ids_B: Tensor
    """int64 content ids: equal ids mean equal text and image bytes."""
    target_ids_B: Tensor
    negative_ids_N: Tensor
    """Of the explicit hard negatives, in the order of their pairs; NO_CONTENT where `padded_to` padded."""
    addresses: tuple[str, ...]
    """One `shard.tar:key` a pair."""
    filler: ModelInputs
    """A chunk of one blank row, whose embedding is not used."""
    one_pass: bool
    """All chunks are encoded with their graph at once; else GradCache. From the configuration: the same on
    every rank."""
    num_fillers: int = 0
    """How many chunks at the end are `filler`."""
    skipped: tuple[SkippedSample, ...] = ()
    """Samples that could not be used and were redrawn for this batch."""

    def __post_init__(self) -> None:
        num_pairs, num_items = self.num_pairs, 2 * self.num_pairs + self.num_negatives
        if (
            self.target_ids_B.shape[0] != num_pairs
            or len(self.addresses) != num_pairs
            or self.row_of_item_R.shape[0] != num_items
        ):
            raise ValueError(
                f"{num_pairs} query ids, {self.target_ids_B.shape[0]} target ids, {len(self.addresses)} "
                f"addresses, {self.row_of_item_R.shape[0]} items; expected {num_items} items"
            )

    @property
    def num_pairs(self) -> int:
        """B, the pairs of this rank."""
        return self.query_ids_B.shape[0]

    @property
    def num_negatives(self) -> int:
        """N, the explicit negatives of this rank and what stands for them."""
        return self.negative_ids_N.shape[0]

    @property
    def num_tokens(self) -> int:
        """Real (unpadded) tokens of all items of this rank."""
        own = self.chunks[: len(self.chunks) - self.num_fillers]
        return sum(int(chunk["attention_mask"].sum()) for chunk in own)

    def padded_to(self, *, num_chunks: int, num_negatives: int) -> Batch:
        """The same batch with fillers up to that many chunks and negatives, so that all ranks have equally
        many."""
        missing_chunks, missing_negatives = num_chunks - len(self.chunks), num_negatives - self.num_negatives
        if missing_chunks < 0 or missing_negatives < 0:
            raise ValueError(
                f"{len(self.chunks)} chunks, {self.num_negatives} negatives: more than {num_chunks}, "
                f"{num_negatives}"
            )
        return replace(
            self,
            chunks=self.chunks + (self.filler,) * missing_chunks,
            num_fillers=self.num_fillers + missing_chunks,
            row_of_item_R=functional.pad(
                self.row_of_item_R, (0, missing_negatives)
            ),  # any row: its id keeps it out of the loss
            negative_ids_N=functional.pad(self.negative_ids_N, (0, missing_negatives), value=NO_CONTENT),
        )

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of all chunks' rows (in a row) -> those of the queries, of the targets, of the
        negatives."""
        query, target, negative = rows[self.row_of_item_R].split(
            [self.num_pairs, self.num_pairs, self.num_negatives]
        )
        return query, target, negative

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by torch's DataLoader."""
        return self.map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its ids and its order on `device`. Each chunk moves when it is encoded."""
        small = ("row_of_item_R", "query_ids_B", "target_ids_B", "negative_ids_N")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in small})

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `move(tensor)` for each tensor, always in the same order."""

        def move_chunk(chunk: ModelInputs) -> ModelInputs:
            return {name: move(tensor) for name, tensor in chunk.items()}

        return replace(
            self,
            chunks=tuple(move_chunk(chunk) for chunk in self.chunks),
            filler=move_chunk(self.filler),
            row_of_item_R=move(self.row_of_item_R),
            query_ids_B=move(self.query_ids_B),
            target_ids_B=move(self.target_ids_B),
            negative_ids_N=move(self.negative_ids_N),
        )
