"""ShareGPT4V's and Urban1k's layouts -> caption sets: one long caption an image.

ShareGPT4V: `share-captioner_coco_lcs_sam_1246k_1107.json`, a list of {image: relative path, conversations:
[..., {value: caption}]}, of which the first 1,000 rows are the set; line breaks become blanks.
Urban1k: `image/<id>.jpg` and the first line of `caption/<id>.txt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agff.errors import DataError
from data_pipeline.layouts.caption_set import CaptionSet, Image, caption_set
from data_pipeline.layouts.eval_items import refuse_all

SHAREGPT4V_FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
_NUM_ROWS = 1_000
_EXPECTED = (1_000, 1_000)
_PIECE = 2**20
"""Characters read at once: the file has more than a gigabyte, the set is in its first two megabytes."""


def read_sharegpt4v(folder: Path, *, images_root: Path | None) -> CaptionSet:
    """The set in a folder. Raises DataError with the row of what is wrong."""
    path = folder / SHAREGPT4V_FILE
    rows, findings = [], []
    for number, row in enumerate(_first_rows(path, _NUM_ROWS)):
        address = f"{folder.name}/{path.name}:row {number}"
        try:
            image, caption = row["image"], row["conversations"][1]["value"]
            if not isinstance(image, str) or not isinstance(caption, str):
                raise TypeError("image and value must be texts")
        except (KeyError, IndexError, TypeError) as error:
            findings.append(
                f"{address}: expected {{image, conversations: [question, {{value: caption}}]}}, "
                f"found {row!r:.80} ({error!r})"
            )
            continue
        rows.append((address, image, [" ".join(caption.split("\n")).strip()]))
    refuse_all(findings, remedy="")
    return caption_set(
        "ShareGPT4V",
        rows,
        image_roots=(images_root,) if images_root else (folder, folder / "data", folder / "images"),
        expected=_EXPECTED,
    )


def is_urban1k(folder: Path) -> bool:
    """Whether captions lie beside images as Urban1k has them."""
    return (folder / "image").is_dir() and (folder / "caption").is_dir()


def read_urban1k(folder: Path, *, images_root: Path | None) -> CaptionSet:
    """The set in a folder, by number. Raises DataError with all files that have no partner."""
    captions = {path.stem: path for path in (folder / "caption").glob("*.txt")}
    alone = sorted({path.stem for path in (folder / "image").glob("*.jpg")} - captions.keys())
    refuse_all([f"{folder.name}/image/{stem}.jpg: no caption/{stem}.txt" for stem in alone], remedy="")
    stems = sorted(captions, key=lambda stem: (int(stem), stem) if stem.isdecimal() else (-1, stem))
    return caption_set(
        "Urban1k",
        (_urban_row(folder.name, captions[stem]) for stem in stems),
        image_roots=(images_root, folder) if images_root else (folder,),
        expected=_EXPECTED,
    )


def _urban_row(name: str, path: Path) -> tuple[str, Image, list[str]]:
    address = f"{name}/caption/{path.name}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{address}: not a text in UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"{address}: cannot be read: {error.strerror}") from None
    return address, f"image/{path.stem}.jpg", lines[:1]


def _first_rows(path: Path, count: int) -> Iterator[Any]:
    """The first values of a JSON list; of a long one no more is read. Raises DataError."""
    decoder, text, number = json.JSONDecoder(), "", 0
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_PIECE).lstrip()
            if not text.startswith("["):
                raise DataError(f"{path}: expected a list, found {text[:40]!r}")
            text = text[1:].lstrip()
            while number < count and not text.startswith("]"):
                try:
                    value, end = decoder.raw_decode(text)
                except ValueError as error:
                    if not (more := file.read(_PIECE)):
                        raise DataError(f"{path}: row {number} is cut or no JSON: {error}") from None
                    text += more
                    continue
                yield value
                number += 1
                text = text[end:].lstrip().removeprefix(",").lstrip()
                if not text:
                    text = file.read(_PIECE).lstrip().removeprefix(",").lstrip()
                    if not text:
                        raise DataError(f"{path}: the list is cut behind row {number - 1}; download it again")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    except RecursionError:
        raise DataError(f"{path}: row {number} is nested too deeply; download it again") from None
