"""Rows whose images a head pools: what each row is, which region it means, which caption it learns.

`agff.processor` writes these inputs where the objective pools images (`Objective.image_cells`), the head
reads them. Which image a row has is a content id on the host, as in IMAGE_IDS, so that chunks are joined
without counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from agff.batch import Item, ModelInputs
from agff.errors import ConfigError
from agff.prompts import PromptConfig
from agff.regions import ImageCells, box_problem
from agff.shared_images import IMAGE_IDS, SharedImages

ROW_KIND, ROW_IMAGE_IDS, BOX = "row_kind_B", "row_image_ids_B", "box_B4"
CAPTION_START, CAPTION_LENGTH = "caption_start_B", "caption_length_B"
WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


class RowKind(IntEnum):
    """What a row is, and so what its image tokens are."""

    TEXT = 0
    """It has none."""
    IMAGE = 1
    REGION = 2
    BLANK = 3
    """A text that carries the blank image of a chunk of texts."""


def row_problem(item: Item, cells: ImageCells | None) -> str | None:
    """Why the item's region or caption cannot be a row; None when it can, or has neither."""
    if item.box is None and not item.caption:
        return None
    what = "region" if item.box is not None else "caption"
    if cells is None:
        return f"has a {what}, which only an objective that pools images, as mm_gem, trains for"
    if item.image is None:
        return f"has a {what} and no image"
    return (
        None if item.box is None else box_problem(item.box, width=item.image.width, height=item.image.height)
    )


def cells_of(item: Item, map_size: tuple[int, int], cells: ImageCells) -> tuple[int, int]:
    """(rows, columns) of the cells that stand for the item's image, whose map has that size, or its
    region."""
    return cells.of_image(*map_size) if item.box is None else cells.of_region


def pooled_sizes(
    items: Sequence[Item], shared: SharedImages, map_sizes: Sequence[tuple[int, int]], cells: ImageCells
) -> list[tuple[int, int]]:
    """`cells_of` each item with an image, or of the blank image where none has one.

    map_sizes: of each different image."""
    with_image = [item for item in items if item.image is not None] or [Item(text="")]
    return [
        cells_of(item, map_sizes[place], cells) for item, place in zip(with_image, shared.index, strict=True)
    ]


def check_fits_pooling(prompts: PromptConfig, tokenizer: Any) -> None:
    """Raise ConfigError unless a model that pools images can have these prompts and this tokenizer."""
    if prompts.num_fine:
        raise ConfigError(
            f"prompts.num_fine={prompts.num_fine}: an objective that pools images, as mm_gem, has one vector "
            "for each item; use prompts.num_fine=0"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end of text (eos_token), with which a caption must end")


def pooled_inputs(
    items: Sequence[Item], shared: SharedImages, *, ends: Sequence[int], captions: Sequence[int], blank: int
) -> dict[str, Tensor]:
    """The tensors of this module for the rows of a chunk.

    ends, captions: of each row, where its prompts end and how many tokens it learns behind them. blank: the
    row that carries the blank image, where no item has one."""
    kinds = [_kind(item) for item in items]
    if not any(kinds):
        kinds[blank] = RowKind.BLANK
    places = iter(shared.index)
    image_ids = [shared.ids[next(places)] if kind else 0 for kind in kinds]
    return {
        IMAGE_IDS: torch.tensor(shared.ids),
        ROW_KIND: torch.tensor(kinds),
        ROW_IMAGE_IDS: torch.tensor(image_ids),
        BOX: torch.tensor([_share_of_image(item) for item in items]),
        CAPTION_START: torch.tensor(ends),
        CAPTION_LENGTH: torch.tensor(captions),
    }


def places_of_images(inputs: ModelInputs) -> list[int]:
    """For each row, which of the chunk's different images is its own; 0 for a row that has none.

    Reads nothing from the device."""
    place: dict[int, int] = {}
    for index, content_id in enumerate(inputs[IMAGE_IDS].tolist()):
        place.setdefault(content_id, index)  # joined chunks may hold one twice
    kinds, ids = inputs[ROW_KIND].tolist(), inputs[ROW_IMAGE_IDS].tolist()
    return [place[each] if kind else 0 for kind, each in zip(kinds, ids, strict=True)]


def _kind(item: Item) -> RowKind:
    if item.image is None:
        return RowKind.TEXT
    return RowKind.IMAGE if item.box is None else RowKind.REGION


def _share_of_image(item: Item) -> tuple[float, ...]:
    if item.box is None or item.image is None:
        return WHOLE_IMAGE
    return tuple(float(at) / side for at, side in zip(item.box, item.image.size * 2, strict=True))
