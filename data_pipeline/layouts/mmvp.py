"""MMVP-VLM's layout -> pairs of texts and images that differ in one visual pattern.

`<root>/Questions.csv` (Question ID, Type, Statement) and `<root>/MLLM_VLM Images/<Type>/<Question ID>.jpg`,
or .png. Rows 2k-1 and 2k are a pair, the odd id first.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from data_pipeline.layouts.eval_items import ItemTable, UniqueItems, refuse_all

_TEXT_PREFIX = "a photo of "
"""Before each statement, as in the published evaluation."""

_COLUMNS = ("Question ID", "Type", "Statement")


@dataclass(frozen=True, kw_only=True)
class MmvpPair:
    """Two statements and the two images they describe, as indexes of items: text i belongs to image i.

    The images are beside MMEB's text of an image target: the form in which the model was trained to embed an
    image.
    """

    pattern: str
    texts: tuple[int, int]
    images: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class MmvpSet(ItemTable):
    """All pairs, in the order of the file."""

    pairs: tuple[MmvpPair, ...]
    left_out: tuple[MmvpPair, ...] = ()
    """Pairs that cannot be scored."""

    @property
    def used(self) -> tuple[int, ...]:
        """The items of the pairs, in order."""
        return tuple(sorted({item for pair in self.pairs for item in (*pair.texts, *pair.images)}))

    def without(self, gone: Collection[int]) -> MmvpSet:
        """The set as it is scored when these items cannot be used: a pair is left out with any of its
        four."""
        hit = [pair for pair in self.pairs if any(item in gone for item in (*pair.texts, *pair.images))]
        pairs = tuple(pair for pair in self.pairs if pair not in hit)
        return replace(self, pairs=pairs, left_out=(*self.left_out, *hit))


def read_mmvp(root: Path) -> MmvpSet:
    """All pairs in the order of the file. No image has been opened; missing ones are among the `findings`.

    Raises DataError with the addresses (file, line) of what is wrong with the table.
    """
    path = root / "Questions.csv"
    rows, findings = [], []
    for line in _lines(path):
        try:
            rows.append(_row(*line))
        except DataError as error:
            findings.append(str(error))
    if not findings:
        findings = list(_wrong_pairs(rows, path))
    refuse_all(findings, remedy="")
    items = UniqueItems((root / "MLLM_VLM Images",))
    pairs = tuple(_pair(items, root, *rows[i : i + 2]) for i in range(0, len(rows), 2))
    return MmvpSet(
        name="MMVP", items=items.items, addresses=items.addresses, findings=items.findings, pairs=pairs
    )


@dataclass(frozen=True, kw_only=True)
class _Row:
    address: str
    question_id: int
    pattern: str
    statement: str


def _lines(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(address, header, cells) of each line that is not empty."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the folder that holds MMVP-VLM's Questions.csv (--mmvp)")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in _COLUMNS if name not in header]:
                raise DataError(f"{path}: missing columns {', '.join(missing)}; found {', '.join(header)}")
            if twice := [name for name in _COLUMNS if header.count(name) > 1]:
                raise DataError(f"{path}: column {twice[0]} is there twice; which one counts cannot be known")
            last = reader.line_num
            for cells in reader:
                address, last = f"{path}:line {last + 1}", reader.line_num
                if cells:
                    yield address, header, cells
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{path}: not a readable CSV file in UTF-8 (line {reader.line_num}): {error}"
            ) from None


def _row(address: str, header: list[str], cells: list[str]) -> _Row:
    if len(cells) != len(header):
        raise DataError(
            f"{address}: {len(cells)} values for {len(header)} columns: {','.join(cells)!r}; a statement "
            'with commas must be in double quotes: 1,Type,"a cat, asleep"'
        )
    values = dict(zip(header, cells, strict=True))
    question_id, pattern, statement = (values[name].strip() for name in _COLUMNS)
    if not re.fullmatch("[1-9][0-9]*", question_id):
        raise DataError(f"{address}: Question ID {question_id!r} is not a whole number from 1 on")
    if not pattern or not statement:
        raise DataError(f"{address}: empty {'Type' if not pattern else 'Statement'}")
    if any("\n" in cell for cell in cells):
        raise DataError(f"{address}: a value runs over several lines; is a closing quote missing?")
    if ".." in PurePosixPath(pattern).parts or PurePosixPath(pattern).is_absolute():
        raise DataError(f"{address}: Type {pattern!r} is also a folder and leaves the images folder")
    return _Row(address=address, question_id=int(question_id), pattern=pattern, statement=statement)


def _wrong_pairs(rows: Sequence[_Row], path: Path) -> Iterator[str]:
    if not rows:
        yield f"{path}: no rows"
    if len(rows) % 2:
        yield f"{path}: {len(rows)} rows; rows 2k-1 and 2k are a pair, so the number must be even"
    seen: dict[int, str] = {}
    for row in rows:
        if row.question_id in seen:
            yield f"{row.address}: Question ID {row.question_id} is {seen[row.question_id]} too"
        seen[row.question_id] = row.address.rpartition(":")[2]
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        if first.question_id % 2 == 0 or second.question_id != first.question_id + 1:
            yield (
                f"{second.address}: Question IDs {first.question_id} and {second.question_id} are no pair; "
                "it must be an odd number and the next"
            )
            return  # one row too many or too few shifts all that follow
        if first.pattern != second.pattern:
            yield (
                f"{second.address}: Type {second.pattern!r}, but the other row of its pair is "
                f"{first.pattern!r}"
            )
        if first.statement == second.statement:
            yield f"{second.address}: both statements of the pair are {first.statement!r}"


def _pair(items: UniqueItems, root: Path, first: _Row, second: _Row) -> MmvpPair:
    rows = (first, second)
    text_1, text_2 = (items.add("tgt", None, _TEXT_PREFIX + row.statement, "", row.address) for row in rows)
    image_1, image_2 = (
        items.add("tgt", None, MMEB_TEXTS.image_alone, _image(root, row), row.address) for row in rows
    )
    return MmvpPair(pattern=first.pattern, texts=(text_1, text_2), images=(image_1, image_2))


def _image(root: Path, row: _Row) -> str:
    """The image's path below the images folder, of the suffix that is there, else .jpg."""
    png = f"{row.pattern}/{row.question_id}.png"
    jpg = f"{row.pattern}/{row.question_id}.jpg"
    folder = root / "MLLM_VLM Images"
    # os.path's: False for a name that no file can have, where Path's raises
    return png if os.path.isfile(folder / png) and not os.path.isfile(folder / jpg) else jpg
