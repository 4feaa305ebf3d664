"""Scores as plain, aligned tables of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from agff.scoring import MeanScore, MmebReport, MmvpReport, PatternScore, SetScore
from launcher.evaluation.truncated import Truncated

WIDTH = 100
"""Columns of a table; longer names are cut."""


def mmeb_table(report: MmebReport) -> str:
    """Precision@1 per set, then the means."""
    sentence = (
        "MMEB layout: the score is the share of queries for which the right candidate scores above all\n"
        "others (Precision@1), chance is what guessing gets, and the last column is score / chance."
    )
    some_left_out = any(score.num_queries_left_out or score.num_candidates_left_out for score in report.sets)
    header = ["set", "meta-task", "in-dist.", "queries", "score %", "chance %", "x chance"]
    sets = [_set_row(score) for score in report.sets]
    means = [_mean_row(score) for score in (*report.meta_tasks, *report.distributions, report.overall)]
    if some_left_out:
        sentence += "\nLeft out: queries + candidates (see the notes below)."
        header.append("left out")
        for row, score in zip(sets, report.sets, strict=True):
            row.append(f"{score.num_queries_left_out:,} + {score.num_candidates_left_out:,}")
        for row in means:
            row.append("")
    return f"{sentence}\n\n{aligned([header, None, *sets, None, *means], num_text_columns=3)}"


def mmvp_table(report: MmvpReport) -> str:
    """Pair accuracy per pattern with its standard error, then the average."""
    sentence = (
        "MMVP-VLM layout: the score is the share of pairs in which both texts pick their own image of the\n"
        "two, chance is what guessing gets, and the last column is score / chance."
    )
    header = ["pattern", "pairs", "score %", "std. error", "chance %", "x chance"]
    rows = [_pattern_row(score) for score in (*report.patterns, report.average)]
    if report.average.num_pairs_left_out:
        header.append("left out")
        for row, score in zip(rows, (*report.patterns, report.average), strict=True):
            row.append(f"{score.num_pairs_left_out:,}")
    return f"{sentence}\n\n{aligned([header, None, *rows[:-1], None, rows[-1]], num_text_columns=1)}"


def truncations_tables(truncated: Truncated, *, mmeb_sets: Sequence[str]) -> list[str]:
    """A row for each truncation: the mean over MMEB's sets, then every other score, four in a table."""
    names = list(dict.fromkeys(name for scores in truncated.values() for name in scores))
    inside = [name for name in names if name in mmeb_sets]
    columns = {"mean of MMEB": inside} if inside else {}
    columns |= {name: [name] for name in names if name not in inside}
    sentence = (
        "Shorter embeddings: the first numbers of each vector, re-normalised, and the first fine ones (0 is\n"
        "the global one alone). Scores in percent; those of each of MMEB's sets are in the file."
    )
    tables = []
    for start in range(0, len(columns), 4):
        some = dict(list(columns.items())[start : start + 4])
        rows = [
            [
                str(cut.dim),
                str(cut.num_fine),
                f"{cut.dim * (1 + cut.num_fine):,}",
                *(f"{sum(scores[name] for name in part) / len(part):.1f}" for part in some.values()),
            ]
            for cut, scores in truncated.items()
        ]
        header = ["dim", "fine", "numbers", *(_cut(name, 17) for name in some)]
        tables.append(f"{sentence}\n\n{aligned([header, None, *rows], num_text_columns=1)}")
    return tables


def note_lines(note: str) -> str:
    """A sentence that must appear beside the scores."""
    return textwrap.fill(f"Note: {note}", WIDTH, break_long_words=False, break_on_hyphens=False)


def _set_row(score: SetScore) -> list[str]:
    in_distribution = "yes" if score.in_distribution else "no"
    return [
        score.name,
        score.meta_task,
        in_distribution,
        *_numbers(score.num_queries, score.score, score.chance),
    ]


def _mean_row(score: MeanScore) -> list[str]:
    sets = "1 set" if score.num_sets == 1 else f"{score.num_sets} sets"
    return [f"mean {score.name}", sets, "", *_numbers(score.num_queries, score.score, score.chance)]


def _pattern_row(score: PatternScore) -> list[str]:
    return [
        score.name,
        f"{score.num_pairs:,}",
        f"{score.score:.1f}",
        f"{score.standard_error:.1f}",
        f"{score.chance:.1f}",
        f"{score.score / score.chance:.1f}",
    ]


def _numbers(num_queries: int, score: float, chance: float) -> tuple[str, ...]:
    return (f"{num_queries:,}", f"{score:.1f}", f"{chance:.2f}", f"{score / chance:.1f}")


def aligned(rows: Sequence[Sequence[str] | None], *, num_text_columns: int) -> str:
    """Rows as lines, text left and numbers right; None is a rule. Text columns are cut to fit into WIDTH, the
    longest first."""
    cells = [row for row in rows if row is not None]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    while (too_long := sum(widths) + 2 * (len(widths) - 1) - WIDTH) > 0:
        longest = max(range(num_text_columns), key=widths.__getitem__)
        others = [widths[column] for column in range(num_text_columns) if column != longest]
        widths[longest] -= min(too_long, max(1, widths[longest] - max(others, default=0)))
    lines = []
    for row in rows:
        if row is None:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
            continue
        parts = (
            _cut(cell, width).ljust(width) if column < num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    """The beginning and the end of a text that is too long."""
    if len(text) <= width:
        return text
    end = (width - 1) // 3
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"
