"""MMEB-train's layout: parquet and image files -> pairs, or the reason why a row cannot be used.

<root>/<SUBSET>/original-00000-of-00001.parquet    qry, qry_image_path, pos_text, pos_image_path,
                                                   neg_text, neg_image_path
               diverse_instruction-...parquet      the other split: the same columns
<root>/images/<SUBSET>/Train/<file>                named by those columns, below the root; "" when absent

In these columns instruction and content are one text. Your own source may keep them apart in qry_inst,
pos_inst, neg_inst, as the newer MMEB-eval does: then they are joined as MMEB's texts are, and the shard says
which part is which. A null cell is an absent value, as "" is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from agff.batch import IMAGE_PLACEHOLDER, MMEB_TEXTS, instructed_text, text_problem, without_placeholder
from agff.errors import DataError
from data_pipeline.layouts.columns import ColumnKind, schema_findings
from data_pipeline.layouts.parts import check_parts, copies

_REQUIRED = ("qry", "qry_image_path", "pos_text", "pos_image_path")
_OPTIONAL = ("neg_text", "neg_image_path", "qry_inst", "pos_inst", "neg_inst")
_READ_BUFFER_BYTES = 2**20
"""Of each column; without it a whole row group, which may be a whole subset, would be held in memory."""
_TEXT = ColumnKind(is_image=False, many=False)
SPLITS = ("original", "diverse_instruction")

_Row = Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a pair: text, image or both, as the subset wrote it."""

    text: str
    image: Path | None
    """The file, below the MMEB root."""
    instruction: str = ""
    """The part of `text` that is instruction, where the source keeps it apart."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One training row."""

    query: Side
    target: Side
    negative: Side | None
    """An explicit hard negative, where the subset has them."""


def find_subsets(root: Path, *, split: str) -> list[str]:
    """Names of the folders that hold parquet files, hidden ones aside. Raises DataError when none has one of
    this split."""
    paths = [path for path in root.glob("*/*.parquet") if not path.parent.name.startswith(".")]
    if not any(path.match(f"{split}-*.parquet") for path in paths):
        raise DataError(
            f"{root}: no <SUBSET>/{split}-*.parquet here; give the folder of an MMEB-train download"
        )
    return sorted({path.parent.name for path in paths})


def parquet_files(root: Path, subset: str, *, split: str) -> list[Path]:
    """The subset's parquet files in order."""
    return sorted((root / subset).glob(f"{split}-*.parquet"))


def count_rows(root: Path, subset: str, *, split: str) -> int:
    """Rows of a subset, from the files' footers.

    Raises DataError, with one line for each finding, for a subset of which a part is absent or there twice,
    that has no row, or a table without the columns of text that MMEB-train has.
    """
    paths = parquet_files(root, subset, split=split)
    if not paths:
        found = ", ".join(sorted(path.name for path in (root / subset).glob("*.parquet")))
        raise DataError(
            f"{root / subset}: no {split}-*.parquet, there are {found}; choose another --split, or name the "
            "other subsets with --subsets"
        )
    findings, total, with_rows = _findings_of_names(paths, split), 0, []
    for path in paths:
        try:
            with pq.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False) as file:
                given = [name for name in _OPTIONAL if name in file.schema_arrow.names]
                findings += schema_findings(file, dict.fromkeys((*_REQUIRED, *given), _TEXT), path)
                total += file.metadata.num_rows
                with_rows += [path] if file.metadata.num_rows else []
        except (OSError, ValueError) as error:
            findings.append(f"{path}: cannot read the parquet file: {error}; download it again")
    findings += copies(with_rows)
    if not findings and not total:
        findings = [f"{root / subset}: {split}-*.parquet: no rows; name the other subsets with --subsets"]
    if findings:
        raise DataError("\n".join(findings))
    return total


def _findings_of_names(paths: Sequence[Path], split: str) -> list[str]:
    """Parts that are absent, or there in two versions; tables that belong to no split."""
    findings = []
    try:
        check_parts(paths)
    except DataError as error:
        findings.append(str(error))
    others = [path for path in paths if not re.fullmatch(rf"{split}-\d+-of-\d+", path.stem)]
    if len(others) < len(paths):
        findings += [f"{path}: is none of the parts beside it; remove it" for path in others]
    splits = " or ".join(f"{name}-*.parquet" for name in SPLITS)
    findings += [
        f"{path}: is not named {splits} and would not be read; rename or remove it"
        for path in sorted(paths[0].parent.glob("[!.]*.parquet"))
        if not any(path.match(f"{name}-*.parquet") for name in SPLITS)
    ]
    return findings


def read_pairs(root: Path, subset: str, *, split: str, start: int, stop: int) -> Iterator[Pair | str]:
    """Rows start .. stop - 1 of a subset: a Pair, or the reason why the row cannot be used."""
    for values in _rows(root, subset, split=split, start=start, stop=stop):
        try:
            yield _pair(root, values)
        except DataError as error:
            yield str(error)


def _rows(root: Path, subset: str, *, split: str, start: int, stop: int) -> Iterator[_Row]:
    """Row groups outside of start .. stop are not read."""
    position = 0
    for path in parquet_files(root, subset, split=split):
        try:
            with pq.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False) as file:
                columns = [name for name in (*_REQUIRED, *_OPTIONAL) if name in file.schema_arrow.names]
                for group in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if position < stop and position + num_rows > start:
                        yield from _rows_of_group(file, group, columns, start - position, stop - position)
                    position += num_rows
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged parquet file: {error}; download it again") from None


def _rows_of_group(
    file: pq.ParquetFile, group: int, columns: list[str], start: int, stop: int
) -> Iterator[_Row]:
    position = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
        first, last = max(start - position, 0), min(stop - position, batch.num_rows)
        if first < last:
            yield from batch.slice(first, last - first).to_pylist()
        position += batch.num_rows
        if position >= stop:
            return


def _pair(root: Path, values: _Row) -> Pair:
    negative = None
    if values.get("neg_text") or values.get("neg_image_path"):
        negative = _side(root, values, "neg", "neg_text", "neg_image_path")
    return Pair(
        query=_side(root, values, "qry", "qry", "qry_image_path"),
        target=_side(root, values, "pos", "pos_text", "pos_image_path"),
        negative=negative,
    )


def _side(root: Path, values: _Row, column: str, text_column: str, image_column: str) -> Side:
    text, image_path = values.get(text_column) or "", values.get(image_column)
    instruction = ""
    if given := values.get(f"{column}_inst"):
        instruction = given.replace(IMAGE_PLACEHOLDER, "").strip()
        text = instructed_text(given, text, is_query=column == "qry", has_image=bool(image_path))
    if not image_path:
        stripped = without_placeholder(text)
        if not stripped.strip():
            raise DataError(f"{column}: neither text nor image")
        return Side(text=stripped, image=None, instruction=instruction if instruction in stripped else "")
    text = text or MMEB_TEXTS.image_alone
    if problem := text_problem(text, has_image=True):
        raise DataError(f"{column}: {problem}")
    relative = PurePosixPath(image_path)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{column}: image path {image_path!r} leaves the MMEB folder")
    return Side(text=text, image=root / relative, instruction=instruction)
