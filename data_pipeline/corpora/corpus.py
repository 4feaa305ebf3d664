"""Items in an order, each with an id, whatever holds them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.layouts.eval_items import EmbeddedImage


@dataclass(frozen=True, kw_only=True)
class CorpusItem:
    """One thing to embed, its image not opened yet."""

    id: str
    text: str | None = None
    """As the source has it; None for an image alone."""
    image: Path | EmbeddedImage | None = None
    image_name: str | None = None
    """By which the image is found again: below the folder of the corpus, or absolute. None where the bytes
    are in a table."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """An item that cannot be used, found without opening its image."""

    id: str
    reason: str


class Corpus(Protocol):
    """A frozen dataclass that can be pickled: rank 0 opens it, all read it."""

    @property
    def num_items(self) -> int:
        """Usable or not."""

    @property
    def fingerprint(self) -> str:
        """Another text for other items, another order, or another folder of images. Of a folder of images the
        names and sizes count, of a table's images the names alone: their bytes are not read."""

    def read(self, start: int, stop: int) -> Iterator[CorpusItem | Unusable]:
        """Items start .. stop - 1. Raises DataError or StorageError when the source cannot be read."""


def image_name(path: Path, folder: Path) -> str:
    """Relative to the folder of the corpus when it is below it, else absolute."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path.absolute())


def place_of(images: Path, folder: Path) -> str:
    """Where the images of a table are, seen from its folder: both may move together."""
    return os.path.relpath(images.resolve(), folder.resolve())


def fingerprint_of(*parts: str | Iterable[str]) -> str:
    """SHA-256 of texts and lists of texts, which keep apart."""
    digest = hashlib.sha256()
    for part in parts:
        for text in [part] if isinstance(part, str) else part:
            digest.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        digest.update(b"|")
    return digest.hexdigest()
