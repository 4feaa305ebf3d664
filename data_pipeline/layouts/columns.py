"""Which parquet columns hold texts and images. Types are checked; a value is never converted into another
type."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agff.errors import DataError
from data_pipeline.layouts.eval_items import EmbeddedImage

_READ_BUFFER_BYTES = 2**20
"""Of each column; without it a whole row group, which may be a whole table, would be held in memory."""
_IMAGE_FIELDS = {"bytes", "path"}
"""Of the struct as which Hugging Face `datasets` writes an image."""


@dataclass(frozen=True, kw_only=True)
class ColumnKind:
    """What a column must hold."""

    is_image: bool
    """A path, or {bytes, path}; else a text."""
    many: bool
    """One value, or a list of them; else one value."""

    def accepts(self, data_type: pa.DataType) -> bool:
        """Whether values of this type can be read as they are."""
        if self.many and _is_list(data_type):
            data_type = data_type.value_type
        return _is_text(data_type) or (self.is_image and _is_image_struct(data_type))

    def __str__(self) -> str:
        one = "an image path or a struct {bytes, path}" if self.is_image else "text"
        return f"{one}, or a list of such" if self.many else one


def _is_text(data_type: pa.DataType) -> bool:
    """Strings of every kind, a categorical of strings, or a column without any value."""
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(data_type) for is_kind in kinds)


def _is_image_struct(data_type: pa.DataType) -> bool:
    """{bytes, path} as Hugging Face `datasets` writes it."""
    if not pa.types.is_struct(data_type) or {part.name for part in data_type} != _IMAGE_FIELDS:
        return False
    content = data_type.field("bytes").type
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    return any(is_kind(content) for is_kind in kinds) and _is_text(data_type.field("path").type)


def _is_list(data_type: pa.DataType) -> bool:
    """Lists of every kind."""
    kinds = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(is_kind(data_type) for is_kind in kinds)


def image_cell(value: str | dict[str, Any] | None) -> str | EmbeddedImage:
    """A path, the image itself where the table holds its bytes, or "" without either."""
    if isinstance(value, dict):
        if value["bytes"] is not None:
            return EmbeddedImage(value["bytes"], name=value["path"] or "bytes in the table")
        return value["path"] or ""
    return value or ""


def read_rows(path: Path, columns: Mapping[str, ColumnKind]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a table; rows are read in small batches, as one may hold a thousand candidates.

    Raises DataError, with file, column and row, when a column is missing, there twice or of another type.
    """
    try:
        with pq.ParquetFile(path) as table:
            if findings := schema_findings(table, columns, path):
                raise DataError("\n".join(findings))
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=list(columns)):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def open_table(path: Path) -> pq.ParquetFile:
    """A parquet file to be read in small pieces."""
    return pq.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)


def rows_between(
    paths: Iterable[Path], choose: Callable[[list[str]], list[str]], *, start: int, stop: int
) -> Iterator[dict[str, Any]]:
    """Rows start .. stop - 1 of tables that follow each other; row groups outside of them are not read.

    choose: of a table's columns those that are read. Raises DataError.
    """
    position = 0
    for path in paths:
        try:
            with open_table(path) as file:
                columns = choose(file.schema_arrow.names)
                for group in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if position < stop and position + num_rows > start:
                        yield from _rows_of_group(file, group, columns, start - position, stop - position)
                    position += num_rows
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged parquet file: {error}; download it again") from None


def _rows_of_group(
    file: pq.ParquetFile, group: int, columns: list[str], start: int, stop: int
) -> Iterator[dict[str, Any]]:
    position = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
        first, last = max(start - position, 0), min(stop - position, batch.num_rows)
        if first < last:
            yield from batch.slice(first, last - first).to_pylist()
        position += batch.num_rows
        if position >= stop:
            return


def column_names(path: Path) -> list[str]:
    """Names of a table's columns. Raises DataError."""
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def schema_findings(table: pq.ParquetFile, columns: Mapping[str, ColumnKind], path: Path) -> list[str]:
    """A line for each column that is missing, there twice or of another type."""
    schema = table.schema_arrow
    findings = []
    if missing := [name for name in columns if name not in schema.names]:
        findings.append(f"{path}: missing columns {', '.join(missing)}; found {', '.join(schema.names)}")
    for name, kind in columns.items():
        if (count := schema.names.count(name)) > 1:
            findings.append(_is_twice(path, name))
        elif count and not kind.accepts(schema.field(name).type):
            findings.append(
                f"{path}:{_first_value(table, name)} ({schema.field(name).type}); it must be {kind}"
            )
    return findings


def refuse_columns_twice(path: Path, found: Sequence[str], read: Collection[str]) -> None:
    """Raise DataError for a column that is read and there twice."""
    if twice := sorted({name for name in read if found.count(name) > 1}):
        raise DataError("\n".join(_is_twice(path, name) for name in twice))


def _is_twice(path: Path, name: str) -> str:
    return f"{path}: column {name} is there twice; which one counts cannot be known"


def _first_value(table: pq.ParquetFile, name: str) -> str:
    number = 0
    for batch in table.iter_batches(batch_size=64, columns=[name]):
        for value in batch.column(0):
            if value.is_valid:
                return f"row {number}: column {name} holds {str(value.as_py())[:40]}"
            number += 1
    return f"row {number}: column {name} holds no value"
