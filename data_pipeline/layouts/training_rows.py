"""What the layouts make of a row of training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agff.batch import IMAGE_PLACEHOLDER, MMEB_TEXTS
from agff.errors import DataError

IMAGE_ALONE = MMEB_TEXTS.image_alone.replace(IMAGE_PLACEHOLDER, "").strip()
"""The instruction of an image that has no text of its own."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a pair: text, image or both, as the source wrote it."""

    text: str
    image: Path | None = None
    """The file."""
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
