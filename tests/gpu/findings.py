"""The table of `make test-gpu`: Markdown and JSON, with the card's name."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.table import Measured, markdown_table
from tests.gpu.where import Where


class Findings:
    """Lines in the order in which the checks ended."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._lines: list[tuple[str, str]] = []

    def note(self, check: str, found: str) -> None:
        """One line."""
        self._lines.append((check, found))

    def write(self, folder: Path) -> None:
        """`folder`/measured.md and `folder`/measured.json."""
        folder.mkdir(parents=True, exist_ok=True)
        origin = f"{self._where.name}; {Measured.here(()).origin}"
        lines = [f"{origin}.", "", *markdown_table(("check", "found"), self._lines)]
        (folder / "measured.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        values = {"machine": origin, "found": dict(self._lines)}
        (folder / "measured.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
