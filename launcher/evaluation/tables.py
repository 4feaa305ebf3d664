"""Scores as a plain, aligned table and as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from agff.scoring import MeanScore, MmebReport, MmvpReport, SetScore


def mmeb_table(report: MmebReport) -> str:
    """Precision@1 per set, then the means."""
    header = ("MMEB layout, Precision@1", "meta-task", "in-dist.", "queries", "score %", "chance %")
    sets = [_set_row(score) for score in report.sets]
    means = [_mean_row(score) for score in (*report.meta_tasks, *report.distributions, report.overall)]
    return _aligned([header, None, *sets, None, *means], num_text_columns=3)


def mmvp_table(report: MmvpReport) -> str:
    """Pair accuracy per pattern with its standard error, then the average."""
    header = ("MMVP-VLM layout, pair accuracy", "pairs", "score %", "std. error", "chance %")
    rows = [
        (
            score.name,
            f"{score.num_pairs:,}",
            f"{score.score:.1f}",
            f"{score.standard_error:.1f}",
            f"{score.chance:.1f}",
        )
        for score in (*report.patterns, report.average)
    ]
    return _aligned([header, None, *rows[:-1], None, rows[-1]], num_text_columns=1)


def report_values(mmeb: MmebReport | None, mmvp: MmvpReport | None) -> dict[str, Any]:
    """Both reports as plain values for JSON; an absent one is null."""
    return {
        "mmeb": asdict(mmeb) if mmeb is not None else None,
        "mmvp": asdict(mmvp) if mmvp is not None else None,
    }


def _set_row(score: SetScore) -> tuple[str, ...]:
    in_distribution = "yes" if score.in_distribution else "no"
    return (
        score.name,
        score.meta_task,
        in_distribution,
        *_numbers(score.num_queries, score.score, score.chance),
    )


def _mean_row(score: MeanScore) -> tuple[str, ...]:
    sets = "1 set" if score.num_sets == 1 else f"{score.num_sets} sets"
    return (f"mean {score.name}", sets, "", *_numbers(score.num_queries, score.score, score.chance))


def _numbers(num_queries: int, score: float, chance: float) -> tuple[str, ...]:
    return (f"{num_queries:,}", f"{score:.1f}", f"{chance:.2f}")


def _aligned(rows: Sequence[Sequence[str] | None], *, num_text_columns: int) -> str:
    """Rows as lines, text left and numbers right; None is a rule."""
    cells = [row for row in rows if row is not None]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in rows:
        if row is None:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
            continue
        parts = (
            cell.ljust(width) if column < num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
