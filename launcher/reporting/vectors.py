"""What the report says of the vectors themselves: which of them decide, what fine ones bring, what shorter
ones lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.evaluation.scores_file import Results
from launcher.reporting.cells import Cell
from launcher.reporting.sections import side_by_side, task_name

PATTERN_NAMES = (
    "global with global (gg)",
    "fine with global (fg)",
    "global with fine (gf)",
    "fine with fine (ff)",
)
"""In the order of agff.similarity.PATTERNS, the query's vectors first."""
PATTERN_SIGNS = ("gg", "fg", "gf", "ff")

Shares = tuple[float, ...]
Pair = tuple[Cell, Cell]
"""The score by all vectors, and by the global ones alone."""


@dataclass(frozen=True, kw_only=True)
class SharesRow:
    """The shares of a set, or the mean of a task's sets, for each model."""

    name: str
    facts: str
    cells: Sequence[Shares | None]
    is_mean: bool = False


@dataclass(frozen=True, kw_only=True)
class FineRow:
    """One score with and without fine vectors, for each model."""

    name: str
    cells: Sequence[Pair | None]


@dataclass(frozen=True, kw_only=True)
class ShorterTable:
    """What one model scores with each truncation."""

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def shares_rows(results: Sequence[Results]) -> list[SharesRow]:
    """Each set, then the mean of each of MMEB's tasks."""
    sets = [{name: use.shares for name, use in result.patterns.items()} for result in results]
    pairs = {name: use.num_pairs for result in results for name, use in result.patterns.items()}
    rows = [
        SharesRow(name=name, facts=f"{pairs[name]:,} right pairs", cells=shares)
        for name, shares in side_by_side(sets)
    ]
    tasks: list[dict[str, Shares]] = []
    for result in results:
        of_task: dict[str, list[Shares]] = {}
        for name, scored in result.sets.items():
            if name in result.patterns:
                of_task.setdefault(scored.score.meta_task, []).append(result.patterns[name].shares)
        tasks.append({name: _mean(shares) for name, shares in of_task.items()})
    rows += [
        SharesRow(name=f"mean {task_name(name)}", facts="", cells=shares, is_mean=True)
        for name, shares in side_by_side(tasks)
    ]
    return rows


def fine_rows(results: Sequence[Results]) -> list[FineRow]:
    """Every score that is known both ways."""
    return [
        FineRow(name=name, cells=pairs)
        for name, pairs in side_by_side([_with_and_without(result) for result in results])
    ]


def shorter_tables(results: Sequence[Results], labels: Sequence[str]) -> list[ShorterTable]:
    """One for each model that was trained for truncations."""
    tables = []
    for result, label in zip(results, labels, strict=True):
        if len(result.truncated) <= 2:  # `fine_rows` shows whole items and the global vectors alone
            continue
        names = list(dict.fromkeys(name for scores in result.truncated.values() for name in scores))
        inside = [name for name in names if name in result.sets]
        columns = {"mean of MMEB": inside} if inside else {}
        columns |= {name: [name] for name in names if name not in inside}
        rows = [
            [
                f"{cut.dim:,} x {1 + cut.num_fine}",
                f"{cut.dim * (1 + cut.num_fine):,}",
                *(f"{sum(scores[name] for name in part) / len(part):.1f}" for part in columns.values()),
            ]
            for cut, scores in result.truncated.items()
        ]
        tables.append(ShorterTable(label=label, head=["size x vectors", "numbers", *columns], rows=rows))
    return tables


def _with_and_without(result: Results) -> dict[str, Pair]:
    """{score: (by all vectors, by the global ones alone)}, both at full length."""
    whole = next(iter(result.truncated), None)
    if whole is None:
        return {}
    scores, alone = result.truncated[whole], result.truncated.get(replace(whole, num_fine=0), {})
    return {name: (Cell(score=scores[name]), Cell(score=alone[name], kind="alone")) for name in alone}


def _mean(shares: Sequence[Shares]) -> Shares:
    return tuple(sum(values) / len(values) for values in zip(*shares, strict=True))
