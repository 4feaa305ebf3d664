"""Retrieval both ways and choices between two captions: from similarities to R@k and to the share of right
choices.

All scores and chance levels are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**22
"""Similarities held at once (16 MB in float32); the result does not depend on it."""
CHOICE_CHANCE = 50.0
"""Of two captions."""


@dataclass(frozen=True, kw_only=True)
class RecallScore:
    """R@1, R@5 and R@10 in one direction: the share of queries for which at least one of their own candidates
    is among the k best (a hit rate, not the share of their own that is found)."""

    direction: str
    """`text to image` and the like."""
    similarity: str
    """`fused`, or `global`: of the global vectors alone."""
    num_queries: int
    num_candidates: int
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    chance_at_1: float
    """The mean over queries of own candidates / candidates."""
    num_queries_left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """Share of images whose own caption is strictly more similar than the negative one."""

    subset: str
    similarity: str
    num_pairs: int
    score: float
    chance: float = CHOICE_CHANCE
    num_pairs_left_out: int = 0


def places(similarity_BC: Tensor, own: Sequence[Collection[int]]) -> list[int]:
    """Per query the number of foreign candidates that are at least as similar as the best of its own: it is a
    hit at k when this is < k.

    own: per row the columns that are right, at least one. A tie counts against the query, and so does NaN.
    Raises ValueError for rows that do not fit.
    """
    if similarity_BC.ndim != 2 or similarity_BC.shape[0] != len(own) or not all(own):
        raise ValueError(
            f"expected ({len(own)}, C) and an own candidate of each query, got {tuple(similarity_BC.shape)}"
        )
    rows = [row for row, columns in enumerate(own) for _ in columns]
    is_own_BC = torch.zeros_like(similarity_BC, dtype=torch.bool)
    is_own_BC[rows, [column for columns in own for column in columns]] = True
    best_B1 = similarity_BC.masked_fill(~is_own_BC, -torch.inf).amax(dim=1, keepdim=True)
    ahead_BC = ~(similarity_BC < best_B1) & ~is_own_BC
    num_ahead_B = ahead_BC.sum(dim=1).masked_fill(best_B1[:, 0].isnan(), similarity_BC.shape[1])
    return num_ahead_B.tolist()


def places_in_blocks(
    similarity: Callable[[slice], Tensor], own: Sequence[Collection[int]], *, num_candidates: int
) -> list[int]:
    """`places` of all queries, with at most BLOCK_ELEMENTS similarities at a time (one row at least).

    similarity: rows of queries -> their (rows, num_candidates) similarities.
    """
    num_rows = max(1, BLOCK_ELEMENTS // max(1, num_candidates))
    blocks = (slice(start, start + num_rows) for start in range(0, len(own), num_rows))
    return [place for rows in blocks for place in places(similarity(rows), own[rows])]


def recall_score(
    places: Sequence[int],
    num_own: Sequence[int],
    *,
    direction: str,
    similarity: str,
    num_candidates: int,
    num_queries_left_out: int = 0,
) -> RecallScore:
    """The scores of one direction; num_own: per query how many candidates are its own."""
    if not places or len(places) != len(num_own):
        raise ValueError(f"{len(places)} places, {len(num_own)} counts of own candidates")

    def recall(k: int) -> float:
        return 100 * sum(place < k for place in places) / len(places)

    return RecallScore(
        direction=direction,
        similarity=similarity,
        num_queries=len(places),
        num_candidates=num_candidates,
        recall_at_1=recall(1),
        recall_at_5=recall(5),
        recall_at_10=recall(10),
        chance_at_1=100 * math.fsum(own / num_candidates for own in num_own) / len(num_own),
        num_queries_left_out=num_queries_left_out,
    )


def choice_score(
    own_P: Tensor, negative_P: Tensor, *, subset: str, similarity: str, num_pairs_left_out: int = 0
) -> ChoiceScore:
    """Share of pairs with own > negative, strictly: a tie is a miss, and so is NaN."""
    if own_P.ndim != 1 or own_P.shape != negative_P.shape or not len(own_P):
        raise ValueError(f"expected two of (P,), got {tuple(own_P.shape)} and {tuple(negative_P.shape)}")
    return ChoiceScore(
        subset=subset,
        similarity=similarity,
        num_pairs=len(own_P),
        score=100 * int((own_P > negative_P).sum()) / len(own_P),
        num_pairs_left_out=num_pairs_left_out,
    )


def mean_choices(name: str, scores: Sequence[ChoiceScore]) -> ChoiceScore:
    """The unweighted mean of subsets that were scored by one similarity."""
    return ChoiceScore(
        subset=name,
        similarity=scores[0].similarity,
        num_pairs=sum(score.num_pairs for score in scores),
        score=math.fsum(score.score for score in scores) / len(scores),
        num_pairs_left_out=sum(score.num_pairs_left_out for score in scores),
    )
