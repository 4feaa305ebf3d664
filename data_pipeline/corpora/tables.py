"""Rows {id, text, image} of a JSON or parquet file; each may lack any of them but not both text and image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from agff.errors import DataError
from data_pipeline.corpora.corpus import CorpusItem, Unusable, fingerprint_of, image_name, place_of
from data_pipeline.layouts.columns import (
    ColumnKind,
    image_cell,
    open_table,
    refuse_columns_twice,
    rows_between,
    schema_findings,
)
from data_pipeline.layouts.eval_items import EmbeddedImage
from data_pipeline.layouts.json_rows import JsonRows, json_rows
from data_pipeline.layouts.training_rows import below

_KINDS = {"text": ColumnKind(is_image=False, many=False), "image": ColumnKind(is_image=True, many=False)}
COLUMNS = ("id", *_KINDS)


@dataclass(frozen=True, kw_only=True)
class JsonItems:
    """A list of objects, or one object a line. Other keys are for others."""

    rows: JsonRows
    images: Path
    """Folder of the images."""
    sha256: str
    """Of the file."""

    @property
    def num_items(self) -> int:
        """See Corpus."""
        return self.rows.num_rows

    @property
    def fingerprint(self) -> str:
        """See Corpus."""
        return fingerprint_of("rows", self.sha256, place_of(self.images, self.rows.path.parent))

    def read(self, start: int, stop: int) -> Iterator[CorpusItem | Unusable]:
        """See Corpus."""
        for number, row in enumerate(self.rows.between(start, stop), start=start):
            yield _item(row, number, images=self.images, folder=self.rows.path.parent)


@dataclass(frozen=True, kw_only=True)
class ParquetItems:
    """Columns id, text, image: paths, or {bytes, path} as Hugging Face `datasets` writes an image."""

    path: Path
    images: Path
    num_items: int
    sha256: str

    @property
    def fingerprint(self) -> str:
        """See Corpus."""
        return fingerprint_of("rows", self.sha256, place_of(self.images, self.path.parent))

    def read(self, start: int, stop: int) -> Iterator[CorpusItem | Unusable]:
        """See Corpus."""
        rows = rows_between([self.path], _columns, start=start, stop=stop)
        for number, row in enumerate(rows, start=start):
            cell = row.get("image")
            yield _item(
                {**row, "image": image_cell(cell) or None},
                number,
                images=self.images,
                folder=self.path.parent,
            )


def open_json_items(path: Path, images: Path, *, sha256: str) -> JsonItems:
    """Raises DataError for a file that is no list of objects, or in which none has text or image."""
    rows = json_rows(path)
    if not rows.num_rows:
        raise DataError(f"{path}: no rows")
    return JsonItems(rows=rows, images=images, sha256=sha256)


def open_parquet_items(path: Path, images: Path, *, sha256: str) -> ParquetItems:
    """Raises DataError, with a line for each finding, for a table without the columns or without rows."""
    try:
        with open_table(path) as table:
            names = list(table.schema_arrow.names)
            refuse_columns_twice(path, names, COLUMNS)
            kinds = {name: kind for name, kind in _KINDS.items() if name in names}
            if not kinds:
                raise DataError(f"{path}: neither a column text nor image; found {', '.join(names)[:300]}")
            findings = schema_findings(table, kinds, path) + _findings_of_id(table.schema_arrow, path)
            num_rows = table.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    if not num_rows:
        findings.append(f"{path}: no rows")
    if findings:
        raise DataError("\n".join(findings))
    return ParquetItems(path=path, images=images, num_items=num_rows, sha256=sha256)


def _findings_of_id(schema: pa.Schema, path: Path) -> list[str]:
    if "id" not in schema.names:
        return []
    found = schema.field("id").type
    if pa.types.is_integer(found) or _KINDS["text"].accepts(found):
        return []
    return [f"{path}: column id ({found}) must be texts or whole numbers"]


def _columns(found: list[str]) -> list[str]:
    return [name for name in COLUMNS if name in found]


def _item(row: Mapping[str, Any], number: int, *, images: Path, folder: Path) -> CorpusItem | Unusable:
    given = row.get("id")
    name = str(number) if given is None else str(given)
    text, image = row.get("text"), row.get("image")
    try:
        if not isinstance(given, str | int | None) or isinstance(given, bool):
            raise DataError(f"id {given!r:.60} must be a text or a whole number")
        if not isinstance(text, str | None):
            raise DataError(f"text must be a text, found {text!r:.60}")
        if not isinstance(image, str | EmbeddedImage | None):
            raise DataError(f"image must be the path of a file, found {image!r:.60}")
        if not (text and text.strip()) and not image:
            raise DataError("neither text nor image")
        if isinstance(image, str) and image:
            path = below(images, image, f"row {number}")
            return CorpusItem(id=name, text=text, image=path, image_name=image_name(path, folder))
        return CorpusItem(id=name, text=text, image=image or None)
    except DataError as error:
        return Unusable(id=name, reason=f"row {number}: {error}".replace(f"row {number}: row", "row"))
