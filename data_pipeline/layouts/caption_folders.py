"""Which caption sets lie in a folder, or in the folders in it, and how each is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from agff.errors import DataError
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.caption_tables import read_caption_tables, tables_of_test_split
from data_pipeline.layouts.long_captions import (
    SHAREGPT4V_FILE,
    is_urban1k,
    read_sharegpt4v,
    read_urban1k,
)
from data_pipeline.layouts.sugarcrepe import ChoiceSet, read_sugarcrepe, sugarcrepe_files

Reader = Callable[[], CaptionSet | ChoiceSet]

EXPECTED = (
    "test*.parquet with the columns image and text (Flickr30k, COCO, or your own), "
    f"{SHAREGPT4V_FILE} (ShareGPT4V), image/<id>.jpg with caption/<id>.txt (Urban1k), or "
    "replace_obj.json and six others (SugarCrepe)"
)
_TABLES = (".parquet", ".json", ".jsonl", ".csv", ".tsv", ".arrow")


def find_caption_sets(root: Path, *, images_root: Path | None, option: str) -> list[Reader]:
    """A reader for each set of `root` itself, else of the folders in it, by name.

    images_root: where images that are files lie, instead of the places beside their tables.
    option: what names `root` on the command line. Raises DataError for a folder without any set, and for each
    folder in it that holds tables of another layout.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder ({option})")
    if readers := list(_readers(root, images_root)):
        return readers
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [reader for folder in folders for reader in _readers(folder, images_root)]
    unknown = [folder for folder in folders if not any(_readers(folder, None)) and _has_tables(folder)]
    if unknown or not found:
        wrong = unknown or [root]
        raise DataError(
            "\n  ".join(f"{folder}: holds no caption set of a known layout" for folder in wrong)
            + f"\nA set's folder holds {EXPECTED} ({option})."
        )
    return found


def _readers(folder: Path, images_root: Path | None) -> Iterator[Reader]:
    if tables_of_test_split(folder):
        yield functools.partial(read_caption_tables, folder, images_root=images_root)
    if (folder / SHAREGPT4V_FILE).is_file():
        yield functools.partial(read_sharegpt4v, folder, images_root=images_root)
    if is_urban1k(folder):
        yield functools.partial(read_urban1k, folder, images_root=images_root)
    if sugarcrepe_files(folder):
        yield functools.partial(read_sugarcrepe, folder, images_root=images_root)


def _has_tables(folder: Path) -> bool:
    """Tables directly in it or in its data/; images alone are no set."""
    places = (folder, folder / "data")
    return any(path.suffix in _TABLES for place in places if place.is_dir() for path in place.iterdir())
