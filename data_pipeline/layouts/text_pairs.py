"""Pairs of sentences with a hard negative, as NLI is laid out for contrastive training.

<file>.csv or .parquet   columns sent0, sent1 and, where there are hard negatives, hard_neg ("" or null: none)
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from agff.batch import text_problem
from agff.errors import DataError
from data_pipeline.layouts.columns import ColumnKind, open_table, rows_between, schema_findings
from data_pipeline.layouts.training_rows import Pair, Side

_REQUIRED, _NEGATIVE = ("sent0", "sent1"), "hard_neg"
_TEXT = ColumnKind(is_image=False, many=False)


@dataclass(frozen=True, kw_only=True)
class TextPairs:
    """One source: sent0 as query, sent1 as target, hard_neg as explicit negative."""

    root: Path
    """The file."""
    name: str

    @property
    def settings(self) -> Mapping[str, Any]:
        """See Layout."""
        return {"layout": "texts"}

    def sources(self) -> list[str]:
        """See Layout."""
        return [self.name]

    def count_rows(self, source: str) -> int:
        """See Layout."""
        count = self._count_parquet() if self._is_parquet else sum(1 for _ in self._csv_rows())
        if not count:
            raise DataError(f"{self.root}: no rows; download it again")
        return count

    def rows(self, source: str, *, start: int, stop: int) -> Iterator[Pair | str]:
        """See Layout."""
        if self._is_parquet:
            rows = rows_between([self.root], _columns, start=start, stop=stop)
        else:
            rows = itertools.islice(self._csv_rows(), start, stop)
        for row in rows:
            try:
                yield _pair(row)
            except DataError as error:
                yield str(error)

    def tables(self, source: str) -> list[Path]:
        """See Layout."""
        return [self.root]

    @property
    def _is_parquet(self) -> bool:
        return self.root.suffix == ".parquet"

    def _count_parquet(self) -> int:
        try:
            with open_table(self.root) as table:
                columns = dict.fromkeys((*_REQUIRED, *_columns(table.schema_arrow.names)), _TEXT)
                findings = schema_findings(table, columns, self.root)
                count: int = table.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.root}: cannot read the parquet file: {error}; download it again"
            ) from None
        if findings:
            raise DataError("\n".join(findings))
        return count

    def _csv_rows(self) -> Iterator[dict[Any, Any]]:
        """Every row by the names of the first line. Raises DataError."""
        try:
            with self.root.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                names = list(reader.fieldnames or ())
                if any(names.count(name) != 1 for name in _REQUIRED) or names.count(_NEGATIVE) > 1:
                    raise DataError(
                        f"{self.root}: the first line must name sent0, sent1 and, if there are any, "
                        f"hard_neg, once each; found {', '.join(names)[:200]}"
                    )
                yield from reader
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{self.root}: not a readable CSV file: {error}; download it again") from None
        except OSError as error:
            raise DataError(f"{self.root}: cannot read it: {error.strerror}") from None


def _columns(found: list[str]) -> list[str]:
    return [name for name in found if name in (*_REQUIRED, _NEGATIVE)]


def _pair(row: Mapping[Any, Any]) -> Pair:
    if None in row:  # as csv calls what has no column
        raise DataError(f"more fields than columns: {row[None]!r:.60}")
    query, target = (_side(name, row.get(name)) for name in _REQUIRED)
    negatives = (_side(_NEGATIVE, row[_NEGATIVE]),) if row.get(_NEGATIVE) else ()
    return Pair(query=query, target=target, negatives=negatives)


def _side(name: str, text: Any) -> Side:
    if not text or not text.strip():
        raise DataError(f"{name}: is empty")
    if problem := text_problem(text, has_image=False):
        raise DataError(f"{name}: {problem}")
    return Side(text=text)
