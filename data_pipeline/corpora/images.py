"""A folder of image files, in the order of their paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agff.errors import DataError
from data_pipeline.corpora.corpus import CorpusItem, Unusable, fingerprint_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""Of what agff.images opens; what a file really is, it finds out."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every image below a folder, hidden files and folders aside; its id is its path there."""

    root: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """In bytes."""
    num_others: int
    """Files that are no images by their names."""
    num_links: int
    """Links to folders, which are not followed: they may lead in a circle."""

    @property
    def num_items(self) -> int:
        """See Corpus."""
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        """See Corpus."""
        return fingerprint_of("images", self.names, map(str, self.sizes))

    def read(self, start: int, stop: int) -> Iterator[CorpusItem | Unusable]:
        """See Corpus."""
        for name in self.names[start:stop]:
            yield CorpusItem(id=name, image=self.root / name, image_name=name)


def find_images(root: Path) -> ImageFolder:
    """Raises DataError for a folder without an image, and for one that cannot be listed."""

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None

    found: list[tuple[str, int]] = []
    num_others = num_links = 0
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        num_links += sum(Path(folder, name).is_symlink() for name in folders)
        for name in files:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in SUFFIXES:
                num_others += 1
                continue
            try:
                found.append((path.relative_to(root).as_posix(), path.stat().st_size))
            except OSError:  # a link to nowhere or in a circle: it is said when it is opened
                found.append((path.relative_to(root).as_posix(), -1))
    if not found:
        links = f"; {num_links:,} links to folders there are not followed" * (num_links > 0)
        raise DataError(
            f"{root}: no images here ({', '.join(SUFFIXES)}){links}; name another folder, or a table"
        )
    names, sizes = zip(*sorted(found), strict=True)
    return ImageFolder(root=root, names=names, sizes=sizes, num_others=num_others, num_links=num_links)
