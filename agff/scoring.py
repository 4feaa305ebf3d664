"""Precision@1, MMVP pair accuracy and their report: from similarities to the numbers of a paper's table.

All scores, chance levels and standard errors are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MMVP_CHANCE = 25.0
"""Two texts, each with two images to pick from."""


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """Precision@1 of one set; chance: the mean over queries of 1 / candidates."""

    name: str
    meta_task: str
    in_distribution: bool
    num_queries: int
    """Scored ones."""
    score: float
    chance: float
    num_queries_left_out: int = 0
    num_candidates_left_out: int = 0
    """Of the lists of the queries that are scored."""


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """The unweighted mean of several sets, as MMEB averages: a small set counts as much as a large one."""

    name: str
    num_sets: int
    num_queries: int
    score: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class MmebReport:
    """Scores of all sets, and their means per meta-task, in and out of distribution and overall."""

    sets: tuple[SetScore, ...]
    meta_tasks: tuple[MeanScore, ...]
    distributions: tuple[MeanScore, ...]
    overall: MeanScore


@dataclass(frozen=True, kw_only=True)
class PatternScore:
    """Pair accuracy of one pattern, with its binomial standard error 100 sqrt(p (1 - p) / pairs).

    The error says how far another sample of as many pairs would scatter; near 0 and 100 it understates (0 of
    15 gives 0).
    """

    name: str
    num_pairs: int
    """Scored ones."""
    score: float
    standard_error: float
    chance: float = MMVP_CHANCE
    num_pairs_left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class MmvpReport:
    """Scores per pattern, and their mean: patterns count alike, whatever their number of pairs.

    The mean's standard error is that of a mean of independent patterns.
    """

    patterns: tuple[PatternScore, ...]
    average: PatternScore


def precision_at_1_hits(similarity_BC: Tensor, candidates: Sequence[Sequence[int]]) -> list[bool]:
    """Per query: does the truth score strictly above every other of its candidates? A tie is a miss, and so
    is NaN.

    candidates: per row the columns that take part, the truth first. The public script counts a tie at index 0
    as a hit.
    """
    if similarity_BC.ndim != 2 or similarity_BC.shape[0] != len(candidates):
        raise ValueError(
            f"expected ({len(candidates)}, C) for {len(candidates)} queries, got {tuple(similarity_BC.shape)}"
        )
    hits = []
    for row, columns in zip(similarity_BC.cpu(), candidates, strict=True):
        if len(columns) < 2:
            raise ValueError(f"a query with {len(columns)} candidates cannot be scored")
        scores = row[torch.as_tensor(columns)]
        hits.append(bool((scores[0] > scores[1:]).all()))
    return hits


def set_score(
    name: str,
    *,
    meta_task: str,
    in_distribution: bool,
    hits: Sequence[bool],
    num_candidates: Sequence[int],
    num_queries_left_out: int = 0,
    num_candidates_left_out: int = 0,
) -> SetScore:
    """The score of one set from its hits and the number of candidates of each query."""
    if not hits or len(hits) != len(num_candidates):
        raise ValueError(f"{len(hits)} hits, {len(num_candidates)} candidate counts")
    return SetScore(
        name=name,
        meta_task=meta_task,
        in_distribution=in_distribution,
        num_queries=len(hits),
        score=100 * sum(hits) / len(hits),
        chance=100 * _mean([1 / count for count in num_candidates]),
        num_queries_left_out=num_queries_left_out,
        num_candidates_left_out=num_candidates_left_out,
    )


def mmeb_report(sets: Sequence[SetScore]) -> MmebReport:
    """All means that MMEB reports; a group without sets is left out."""
    if not sets:
        raise ValueError("no sets to report")
    meta_tasks = dict.fromkeys(score.meta_task for score in sets)
    inside = [score for score in sets if score.in_distribution]
    outside = [score for score in sets if not score.in_distribution]
    return MmebReport(
        sets=tuple(sets),
        meta_tasks=tuple(_mean_score(task, [s for s in sets if s.meta_task == task]) for task in meta_tasks),
        distributions=tuple(
            _mean_score(name, scores)
            for name, scores in (("in distribution", inside), ("out of distribution", outside))
            if scores
        ),
        overall=_mean_score("overall", sets),
    )


def mmvp_pair_hits(similarity_P22: Tensor) -> Tensor:
    """(P,) bool: both texts of a pair pick the right image. A tie is no hit (ours).

    similarity_P22: [pair, text, image]; text i belongs to image i.
    """
    if similarity_P22.ndim != 3 or similarity_P22.shape[1:] != (2, 2):
        raise ValueError(f"expected (P, 2, 2), got {tuple(similarity_P22.shape)}")
    first_P = similarity_P22[:, 0, 0] > similarity_P22[:, 0, 1]
    second_P = similarity_P22[:, 1, 1] > similarity_P22[:, 1, 0]
    return first_P & second_P


def mmvp_report(patterns: Sequence[str], hits: Sequence[bool], *, left_out: Sequence[str] = ()) -> MmvpReport:
    """Scores per pattern, in order of first appearance, and their mean. One pattern name and one hit per
    pair.

    left_out: the pattern of each pair that could not be scored; a pattern of which no pair remains is counted
    in the average's only.
    """
    if not hits or len(patterns) != len(hits):
        raise ValueError(f"{len(patterns)} patterns, {len(hits)} hits")
    scores = tuple(
        _pattern_score(
            name,
            [hit for pattern, hit in zip(patterns, hits, strict=True) if pattern == name],
            num_pairs_left_out=list(left_out).count(name),
        )
        for name in dict.fromkeys(patterns)
    )
    average = PatternScore(
        name="average",
        num_pairs=len(hits),
        score=_mean([score.score for score in scores]),
        standard_error=math.sqrt(sum(score.standard_error**2 for score in scores)) / len(scores),
        num_pairs_left_out=len(left_out),
    )
    return MmvpReport(patterns=scores, average=average)


def _pattern_score(name: str, hits: Sequence[bool], *, num_pairs_left_out: int) -> PatternScore:
    share = sum(hits) / len(hits)
    return PatternScore(
        name=name,
        num_pairs=len(hits),
        score=100 * share,
        standard_error=100 * math.sqrt(share * (1 - share) / len(hits)),
        num_pairs_left_out=num_pairs_left_out,
    )


def _mean_score(name: str, sets: Sequence[SetScore]) -> MeanScore:
    return MeanScore(
        name=name,
        num_sets=len(sets),
        num_queries=sum(score.num_queries for score in sets),
        score=_mean([score.score for score in sets]),
        chance=_mean([score.chance for score in sets]),
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
