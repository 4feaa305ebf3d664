"""MMVP-VLM's layout -> pairs of texts and images that differ in one visual pattern.

`<root>/Questions.csv` (Question ID, Type, Statement) and `<root>/MLLM_VLM Images/<Type>/<Question ID>.jpg`,
or .png. Rows 2k-1 and 2k are a pair, the odd id first.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agff.errors import DataError
from agff.item_text import MMEB_TEXTS
from data_pipeline.layouts.mmeb_eval import EvalItem

TEXT_PREFIX = "a photo of "
"""Stands before each statement, as in the published evaluation."""

_COLUMNS = ("Question ID", "Type", "Statement")


@dataclass(frozen=True, kw_only=True)
class MmvpPair:
    """Two statements and the two images they describe: text i belongs to image i.

    The images stand beside MMEB's text of an image target: the form in which the model was trained to embed
    an image.
    """

    pattern: str
    texts: tuple[EvalItem, EvalItem]
    images: tuple[EvalItem, EvalItem]


def read_mmvp(root: Path) -> tuple[MmvpPair, ...]:
    """All pairs in the order of the file. Every image is known to exist, none has been opened.

    Raises DataError with the address (file, line) of what is wrong.
    """
    rows = _rows(root / "Questions.csv")
    if len(rows) % 2:
        raise DataError(
            f"{root / 'Questions.csv'}: {len(rows)} rows; rows 2k-1 and 2k are a pair, so the number must be "
            "even"
        )
    return tuple(_pair(root, rows[i], rows[i + 1]) for i in range(0, len(rows), 2))


@dataclass(frozen=True, kw_only=True)
class _Row:
    address: str
    question_id: int
    pattern: str
    statement: str


def _rows(path: Path) -> list[_Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the folder that holds MMVP-VLM's Questions.csv (--mmvp)")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise DataError(
                    f"{path}: missing columns {', '.join(missing)}; found "
                    f"{', '.join(reader.fieldnames or ())}"
                )
            rows = [_row(f"{path}:line {reader.line_num}", row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a readable CSV file in UTF-8: {error}") from None
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _row(address: str, row: dict[str, str | None]) -> _Row:
    question_id, pattern, statement = ((row[name] or "").strip() for name in _COLUMNS)
    if not question_id.isdecimal():
        raise DataError(f"{address}: Question ID {question_id!r} is not a whole number")
    if not pattern or not statement:
        raise DataError(f"{address}: empty {'Type' if not pattern else 'Statement'}")
    if ".." in PurePosixPath(pattern).parts or PurePosixPath(pattern).is_absolute():
        raise DataError(f"{address}: Type {pattern!r} is also a folder and leaves the images folder")
    return _Row(address=address, question_id=int(question_id), pattern=pattern, statement=statement)


def _pair(root: Path, first: _Row, second: _Row) -> MmvpPair:
    if first.pattern != second.pattern:
        raise DataError(
            f"{second.address}: Type {second.pattern!r}, but the other row of its pair is {first.pattern!r}"
        )
    if first.question_id % 2 == 0 or second.question_id != first.question_id + 1:
        raise DataError(
            f"{second.address}: Question IDs {first.question_id} and {second.question_id} are no pair; "
            "it must be an odd number and the next"
        )
    return MmvpPair(
        pattern=first.pattern,
        texts=(EvalItem(TEXT_PREFIX + first.statement), EvalItem(TEXT_PREFIX + second.statement)),
        images=(_image(root, first), _image(root, second)),
    )


def _image(root: Path, row: _Row) -> EvalItem:
    for suffix in (".jpg", ".png"):
        path = root / "MLLM_VLM Images" / row.pattern / f"{row.question_id}{suffix}"
        if path.is_file():
            return EvalItem(MMEB_TEXTS.image_alone, path)
    raise DataError(f"{row.address}: image {path.with_suffix('.jpg')} not found")
