"""What every layout of training data offers to the conversion (data_pipeline/convert.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.layouts.training_rows import Pair, RegionRow


class Layout(Protocol):
    """Files on disk that hold rows of one or more sources. A frozen dataclass of paths: every writer gets a
    copy."""

    @property
    def root(self) -> Path:
        """What errors call it."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the rows beside the tables."""

    def sources(self) -> list[str]:
        """Their names. Raises DataError when there are none."""

    def count_rows(self, source: str) -> int:
        """Raises DataError, with one line for each finding, for tables that cannot be read as a whole."""

    def rows(self, source: str, *, start: int, stop: int) -> Iterator[Pair | RegionRow | str]:
        """Rows start .. stop - 1, or the reason why one cannot be used."""

    def tables(self, source: str) -> list[Path]:
        """The files whose bytes decide the rows."""
