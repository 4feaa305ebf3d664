"""Flickr30k's and COCO's layout -> caption sets: parquet files of the split `test` with the columns `image`
and `text`.

`image` is a path or Hugging Face's struct {bytes, path}; `text` a caption or a list of them. The files are
`test*.parquet`, in the set's folder, in its data/ or in its test/. A folder with `flickr` or `coco` in its
name is the published set, of COCO only the first five captions of an image are read; any other is a set of
your own.

`caption_set.json` beside them, which is ours, may say {"image_text": ..., "note": ...}: what stands beside
each image, as the model was trained (default: MMEB's text of an image target), and a sentence that must
appear beside the scores.

Images that lie in the tables stay in memory until the set is scored, 0.8 GB for COCO.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agff.batch import MMEB_TEXTS, text_problem
from agff.errors import DataError
from data_pipeline.layouts.caption_set import CaptionSet, Image, caption_set
from data_pipeline.layouts.columns import ColumnKind, image_cell, read_rows
from data_pipeline.layouts.json_rows import read_json
from data_pipeline.layouts.parts import check_parts

DESCRIPTION = "caption_set.json"
_COLUMNS = {
    "image": ColumnKind(is_image=True, many=False),
    "text": ColumnKind(is_image=False, many=True),
}
_PUBLISHED = {"flickr": ("Flickr30k", (1_000, 5_000)), "coco": ("COCO", (5_000, 25_000))}
_COCO_CAPTIONS = 5


def tables_of_test_split(folder: Path) -> list[Path]:
    """The parquet files of the split `test`."""
    places = (folder.glob("test*.parquet"), folder.glob("data/test*.parquet"), folder.glob("test/*.parquet"))
    return sorted(path for paths in places for path in paths)


def read_caption_tables(folder: Path, *, images_root: Path | None) -> CaptionSet:
    """The set in a folder. Raises DataError with the addresses of what is wrong with its tables."""
    paths = tables_of_test_split(folder)
    check_parts(paths)
    if len(folders := sorted({str(path.parent) for path in paths})) > 1:
        raise DataError(
            f"{folder}: the split test is in {' and in '.join(folders)}, and would be read twice; keep one"
        )
    lowered = folder.name.lower()
    known = next((key for key in _PUBLISHED if key in lowered), None)
    name, expected = _PUBLISHED[known] if known else (folder.name, None)
    image_text, note = _description(folder / DESCRIPTION)
    return caption_set(
        name,
        _rows(folder, paths, most=_COCO_CAPTIONS if known == "coco" else None),
        image_roots=(images_root,) if images_root else (folder / "images", folder),
        expected=expected,
        image_text=image_text,
        note=note,
    )


def _rows(folder: Path, paths: list[Path], *, most: int | None) -> Iterator[tuple[str, Image, list[str]]]:
    for path in paths:
        for number, row in read_rows(path, _COLUMNS):
            texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
            address = f"{folder.name}/{path.relative_to(folder)}:row {number}"
            yield address, image_cell(row["image"]), [text or "" for text in texts][:most]


def _description(path: Path) -> tuple[str, str | None]:
    """(text beside each image, note) of a set's own description; the usual ones without it."""
    if not path.exists():
        return MMEB_TEXTS.image_alone, None
    values = read_json(path)
    keys = ("image_text", "note")
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise DataError(f"{path}: expected {{{', '.join(keys)}}} with texts, found {values!r:.100}")
    if unknown := [key for key in values if key not in keys]:
        raise DataError(f"{path}: unknown keys {unknown}; a set has {', '.join(keys)}")
    image_text = values.get("image_text", MMEB_TEXTS.image_alone)
    if problem := text_problem(image_text, has_image=True):
        raise DataError(f"{path}: image_text: {problem}")
    return image_text, values.get("note")
