"""How well queries find their targets among held-out pairs, beside a loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from agff.similarity import fused_similarity
from launcher.validation.held_out import DIRECTIONS, Pairs, recall_of_source

BETA = 0.05
JUDGE = cast(Any, SimpleNamespace(similarity=lambda a, b: fused_similarity(a, b, beta=BETA)))


def pairs_of(query_ids: list[int], target_ids: list[int], *, seed: int = 0, num_vectors: int = 3) -> Pairs:
    """Equal ids have equal vectors."""
    generator = torch.Generator().manual_seed(seed)
    ids = sorted({*query_ids, *target_ids})
    vectors = torch.nn.functional.normalize(
        torch.randn(len(ids), num_vectors, 8, generator=generator), dim=-1
    )
    rows = {content_id: vectors[place] for place, content_id in enumerate(ids)}
    return Pairs(
        source_P=torch.zeros(len(query_ids), dtype=torch.int64),
        query_PMD=torch.stack([rows[content_id] for content_id in query_ids]),
        target_PMD=torch.stack([rows[content_id] for content_id in target_ids]),
        query_ids_P=torch.tensor(query_ids),
        target_ids_P=torch.tensor(target_ids),
    )


def hit_rates(rows: dict[int, Tensor], columns: dict[int, Tensor], own: set[tuple[int, int]]) -> list[float]:
    """R@1, R@5, R@10 of a loop: foreign candidates that are at least as similar as the best own one."""
    ahead = []
    for row, vectors in rows.items():
        of = {
            column: float(fused_similarity(vectors[None], other[None], beta=BETA))
            for column, other in columns.items()
            if column != row or (row, column) in own
        }
        best = max(of[column] for column in of if (row, column) in own)
        ahead.append(sum(value >= best for column, value in of.items() if (row, column) not in own))
    return [100 * sum(count < k for count in ahead) / len(ahead) for k in (1, 5, 10)]


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_recall_is_that_of_a_loop_over_distinct_items(seed: int, num_vectors: int) -> None:
    """With a query of two targets, a target of two queries, a pair that comes again, and an item that is a
    query of one pair and a target of another."""
    query_ids = [*range(20), 0, 3, 21, 4]
    target_ids = [*range(100, 120), 120, 103, 107, 5]
    pairs = pairs_of(query_ids, target_ids, seed=seed, num_vectors=num_vectors)
    queries = dict(zip(query_ids, pairs.query_PMD, strict=True))
    targets = dict(zip(target_ids, pairs.target_PMD, strict=True))
    own = set(zip(query_ids, target_ids, strict=True))
    found = recall_of_source(JUDGE, pairs)
    assert tuple(score.direction for score in found) == DIRECTIONS
    assert [score.num_queries for score in found] == [21, 22]
    assert {score.similarity for score in found} == {"fused" if num_vectors > 1 else "global"}
    for score, expected in zip(
        found,
        (hit_rates(queries, targets, own), hit_rates(targets, queries, {(t, q) for q, t in own})),
        strict=True,
    ):
        assert [score.recall_at_1, score.recall_at_5, score.recall_at_10] == pytest.approx(expected)


def test_an_item_that_is_its_own_candidate_does_not_count_against_itself() -> None:
    pairs = pairs_of([1, 2], [2, 3])
    to_target, _ = recall_of_source(JUDGE, pairs)
    similarity = JUDGE.similarity(pairs.query_PMD, pairs.target_PMD)
    assert similarity[1, 0] > similarity[1, 1], "query 2 is the candidate 2"
    assert to_target.recall_at_1 >= 50


def test_pairs_are_taken_by_source() -> None:
    pairs = pairs_of([1, 2, 3], [11, 12, 13])
    joined = Pairs.joined([pairs, pairs])
    assert len(joined.query_ids_P) == 6
    pairs.source_P[1] = 1
    assert pairs.of_source(1).target_ids_P.tolist() == [12]
