"""What the report's tables hold: a score of one model, a row of several models' scores, an axis for bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score of one model."""

    score: float
    error: float | None = None
    """Standard error, in the unit of the score."""
    chance: float | None = None
    """What the bar's mark shows."""
    beside: str = ""
    kind: str = "value"
    """The bar's class in the page's style."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a cell for each model, None where it has no such score."""

    name: str
    facts: str
    cells: Sequence[Cell | None]
    is_mean: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From 0 to the end of a bar."""

    end: float
    unit: str = " %"

    @property
    def label(self) -> str:
        """Its end, with the unit."""
        return f"{self.end:g}{self.unit}"

    def place(self, value: float) -> str:
        """Of a value, in percent of the axis, kept on it."""
        return f"{min(100.0, max(0.0, 100 * value / self.end)):.2f}"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table with its explanation."""

    anchor: str
    title: str
    sentence: str
    what: str
    """Header of the first column."""
    short: str = ""
    """Before the name of a row, where it is shown alone."""
    rows: Sequence[Row]
    chance_name: str = "chance"
    number: str = "%.1f"
    unit: str = " %"
    ends: Sequence[float] = (10, 25, 50, 100)
    """The axis is the first of these that holds all scores."""

    @property
    def axis(self) -> Axis:
        """One for all bars of the table."""
        return axis_for((cell for row in self.rows for cell in row.cells), self.ends, self.unit)

    @property
    def has_error(self) -> bool:
        """Whether any score has one."""
        return any(cell is not None and cell.error is not None for row in self.rows for cell in row.cells)


def axis_for(cells: Iterable[Cell | None], ends: Sequence[float], unit: str) -> Axis:
    """The shortest axis that holds all cells, with their errors and their chance."""
    most = max(
        (max(cell.score + (cell.error or 0), cell.chance or 0) for cell in cells if cell is not None),
        default=0.0,
    )
    return Axis(end=next((end for end in ends if end >= most), ends[-1]), unit=unit)


def binomial_error(score: float, count: int) -> float:
    """Standard error of a share in percent, 100 sqrt(p (1 - p) / count)."""
    share = score / 100
    return 100 * math.sqrt(share * (1 - share) / count)


def error_of_mean(errors: Sequence[float]) -> float:
    """Standard error of a mean of independent values."""
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def times_chance(score: float, chance: float) -> str:
    """`56.0 x chance (0.24 %)`."""
    return f"{score / chance:.1f} x chance ({chance:.2f} %)"
