"""What the layouts make of a row of training data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from agff.batch import IMAGE_PLACEHOLDER, MMEB_TEXTS, text_problem
from agff.errors import DataError
from data_pipeline.layouts.eval_items import EmbeddedImage

IMAGE_ALONE = MMEB_TEXTS.image_alone.replace(IMAGE_PLACEHOLDER, "").strip()
"""The instruction of an image that has no text of its own."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a pair: text, image or both, as the source wrote it."""

    text: str
    image: Path | EmbeddedImage | None = None
    """The file, or the image itself where the table holds its bytes."""
    instruction: str = ""
    """The part of `text` that is instruction, where the source keeps it apart."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One training row."""

    query: Side
    target: Side
    negatives: tuple[Side, ...] = ()
    """Explicit hard negatives, where the source has them."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """Query, target, negatives."""
        return (self.query, self.target, *self.negatives)


def below(root: Path, path: str, name: str) -> Path:
    """A path that a table names, below the folder of the images. Raises DataError, with the side's name, for
    one that leaves it."""
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{name}: image path {path!r} leaves the folder of the images")
    return root / relative


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of an image and what is said of it."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the upright image."""
    phrase: str


@dataclass(frozen=True, kw_only=True)
class RegionRow:
    """An image and its regions; training draws one of them."""

    image: Path | EmbeddedImage
    regions: tuple[Region | str, ...]
    """A text is the reason why a region cannot be used."""
    size: tuple[int, int] | None = None
    """Width and height of the image that the source's boxes are of, where it says them."""

    @property
    def image_name(self) -> str:
        """What errors call the image."""
        return self.image.name if isinstance(self.image, EmbeddedImage) else str(self.image)


def region(box: Any, phrase: Any, name: str) -> Region | str:
    """A region of what a file holds, or why it is none. Whether it is inside the image is not known yet."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
        return f"{name}: box {box!r:.60} must be four numbers, x0, y0, x1, y1"
    if not isinstance(phrase, str) or not phrase.strip():
        return f"{name}: phrase {phrase!r:.60} must be a text that is not empty"
    if problem := text_problem(phrase, has_image=False):
        return f"{name}: {problem}"
    x0, y0, x1, y1 = map(float, box)
    return Region(box=(x0, y0, x1, y1), phrase=phrase.strip())


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; JSON's integers have no limit."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max
