"""What a benchmark found, as rows of ratios; JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.turns import Ratio

INSTRUCTION_SETS = ("avx512_bf16", "amx_bf16", "avx512f", "avx2")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio, or, where nothing is compared, one figure."""

    group: str
    what: str
    """Of ours; rows with the same words are one line of the README."""
    case: str
    against: str
    quantity: str
    """Of which the ratio is taken, ours / the other's."""
    ratio: float
    low: float | None = None
    """A quarter of the rounds is below; None where it is counted, not timed."""
    high: float | None = None
    note: str = ""

    @classmethod
    def of(cls, ratio: Ratio, **words: str) -> Row:
        """Of a ratio that was measured in turn."""
        return cls(ratio=ratio.median, low=ratio.low, high=ratio.high, **words)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A whole table."""

    date: str
    commit: str
    machine: str
    rows: tuple[Row, ...]

    @classmethod
    def here(cls, rows: Iterable[Row]) -> Measured:
        """With today's date, the commit that is checked out, and this machine."""
        return cls(date=date.today().isoformat(), commit=commit(), machine=machine(), rows=tuple(rows))

    @classmethod
    def read(cls, path: Path) -> Measured:
        """What `write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "rows": tuple(Row(**row) for row in values["rows"])})

    def write(self, folder: Path) -> None:
        """`folder`/measured.json and `folder`/measured.md."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / "measured.json").write_text(text + "\n", encoding="utf-8")
        (folder / "measured.md").write_text(self.markdown(), encoding="utf-8")

    @property
    def origin(self) -> str:
        """When and where, in one line."""
        return f"{self.date}, commit {self.commit}, {self.machine}"

    def markdown(self) -> str:
        """Every row."""
        lines = [f"{self.origin}.", ""]
        lines += markdown_table(
            ("measured", "case", "against", "of", "ratio", "middle half of the rounds", "note"),
            [
                (row.what, row.case, row.against, row.quantity, f"{row.ratio:.2f}", _spread(row), row.note)
                for row in self.rows
            ],
        )
        return "\n".join(lines) + "\n"

    def summary(self, groups: Sequence[str]) -> str:
        """Of these groups, one line for all cases of a measurement."""
        cases: dict[tuple[str, ...], list[Row]] = {}
        for row in [row for row in self.rows if row.group in groups]:
            cases.setdefault((row.group, row.what, row.against, row.quantity), []).append(row)
        lines = markdown_table(
            (f"ours / theirs, medians ({self.origin})", "of", "ratio"),
            [
                (
                    f"{what} / {against}",
                    quantity,
                    "; ".join(f"{row.case} {row.ratio:.2f}".strip() for row in rows),
                )
                for (_, what, against, quantity), rows in cases.items()
            ],
        )
        return "\n".join(lines) + "\n"


def _spread(row: Row) -> str:
    return "counted" if row.low is None or row.high is None else f"{row.low:.2f} to {row.high:.2f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def machine() -> str:
    """Processor, instruction set, cores, memory and torch; on a GPU its name first."""
    cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = (line.partition(":") for line in cpu_info.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = facts.get("flags", "").split()
    instructions = next((name for name in INSTRUCTION_SETS if name in flags), platform.machine())
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{facts.get('model name', platform.processor())} ({instructions}), {os.cpu_count()} cores, "
        f"{memory_gib:.0f} GiB, torch {torch.__version__}"
    )


def commit() -> str:
    """Short, with `+` when files differ from it; "unknown" outside a clone."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
