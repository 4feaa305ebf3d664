"""Scores against slow, obvious counts."""

from __future__ import annotations

import math
import random

import pytest
import torch

from agff.scoring import (
    SetScore,
    mmeb_report,
    mmvp_pair_hits,
    mmvp_report,
    precision_at_1_hits,
    set_score,
)


def slow_hit(scores: list[float], candidates: list[int]) -> bool:
    truth, *others = candidates
    return not any(scores[other] >= scores[truth] for other in others)


def test_precision_equals_a_slow_count_with_many_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity_BC = torch.randint(0, 4, (200, 7), generator=generator).float()
    rng = random.Random(0)
    candidates = [rng.sample(range(7), rng.randint(2, 7)) for _ in range(200)]
    expected = [
        slow_hit(row.tolist(), columns) for row, columns in zip(similarity_BC, candidates, strict=True)
    ]
    assert precision_at_1_hits(similarity_BC, candidates) == expected
    assert 0 < sum(expected) < 200


@pytest.mark.parametrize(
    ("scores", "hit"),
    [
        ([0.5, 0.4], True),
        ([0.5, 0.5], False),
        ([0.4, 0.5], False),
        ([math.nan, 0.5], False),
        ([0.5, math.nan], False),
    ],
)
def test_tie_and_nan_are_misses(scores: list[float], hit: bool) -> None:
    assert precision_at_1_hits(torch.tensor([scores]), [[0, 1]]) == [hit]


def test_only_a_query_s_own_candidates_count() -> None:
    assert precision_at_1_hits(torch.tensor([[0.9, 0.5, 0.4]]), [[1, 2]]) == [True]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(1, C\)"):
        precision_at_1_hits(torch.zeros(2, 3), [[0, 1]])
    with pytest.raises(ValueError, match="1 candidates cannot be scored"):
        precision_at_1_hits(torch.zeros(1, 3), [[0]])
    with pytest.raises(ValueError, match=r"expected \(P, 2, 2\)"):
        mmvp_pair_hits(torch.zeros(3, 4))


def test_chance_is_the_mean_of_one_over_the_candidates() -> None:
    score = set_score("A", meta_task="vqa", in_distribution=True, hits=[True, False], num_candidates=[2, 4])
    assert (score.score, score.chance, score.num_queries) == (50.0, 37.5, 2)


def a_set(name: str, meta_task: str, in_distribution: bool, score: float, num_queries: int) -> SetScore:
    return SetScore(
        name=name,
        meta_task=meta_task,
        in_distribution=in_distribution,
        num_queries=num_queries,
        score=score,
        chance=score / 10,
    )


def test_means_weigh_sets_alike_whatever_their_size() -> None:
    report = mmeb_report(
        [
            a_set("A", "vqa", True, 10, 1),
            a_set("B", "vqa", False, 40, 1000),
            a_set("C", "retrieval", False, 100, 10),
        ]
    )
    means = {mean.name: mean for mean in (*report.meta_tasks, *report.distributions, report.overall)}
    assert {name: mean.score for name, mean in means.items()} == {
        "vqa": 25,
        "retrieval": 100,
        "in distribution": 10,
        "out of distribution": 70,
        "overall": 50,
    }
    assert means["vqa"].num_queries == 1001
    assert means["overall"].chance == pytest.approx(5)
    assert means["out of distribution"].num_sets == 2


def test_absent_distribution_is_left_out() -> None:
    report = mmeb_report([a_set("A", "vqa", True, 10, 1)])
    assert [mean.name for mean in report.distributions] == ["in distribution"]


def slow_pair_hit(table: list[list[float]]) -> bool:
    return all(table[text][text] > table[text][1 - text] for text in (0, 1))


def test_pair_counts_only_if_both_texts_pick_the_right_image() -> None:
    similarity_P22 = torch.randint(0, 3, (300, 2, 2), generator=torch.Generator().manual_seed(1)).float()
    expected = [slow_pair_hit(table.tolist()) for table in similarity_P22]
    assert mmvp_pair_hits(similarity_P22).tolist() == expected
    assert 0 < sum(expected) < 300


def test_texts_choose_between_images_and_not_the_other_way_round() -> None:
    # each image prefers its own text, but text 0 prefers image 1
    similarity_P22 = torch.tensor([[[0.5, 0.6], [0.1, 0.7]]])
    assert mmvp_pair_hits(similarity_P22).tolist() == [False]


def test_random_pairs_score_a_quarter() -> None:
    similarity_P22 = torch.rand(20_000, 2, 2, generator=torch.Generator().manual_seed(2))
    # four standard errors of 20,000 pairs
    assert mmvp_pair_hits(similarity_P22).float().mean().item() == pytest.approx(0.25, abs=0.0123)


def test_standard_error_equals_the_scatter_of_repeated_samples() -> None:
    rng = random.Random(0)
    report = mmvp_report(["colour"] * 15, [True] * 6 + [False] * 9)
    shares = [100 * sum(rng.random() < 0.4 for _ in range(15)) / 15 for _ in range(20_000)]
    mean = sum(shares) / len(shares)
    scatter = math.sqrt(sum((share - mean) ** 2 for share in shares) / len(shares))
    assert report.patterns[0].standard_error == pytest.approx(scatter, rel=0.02)


def test_average_weighs_patterns_alike_and_adds_their_errors_in_quadrature() -> None:
    report = mmvp_report(["a", "b", "b", "b", "b", "a"], [True, True, False, False, False, False])
    assert [(p.name, p.num_pairs, p.score) for p in report.patterns] == [("a", 2, 50.0), ("b", 4, 25.0)]
    assert report.average.score == 37.5
    assert report.average.num_pairs == 6
    errors = [pattern.standard_error for pattern in report.patterns]
    assert report.average.standard_error == pytest.approx(math.hypot(*errors) / 2)


def test_nothing_to_report_is_refused() -> None:
    with pytest.raises(ValueError, match="no sets"):
        mmeb_report([])
    with pytest.raises(ValueError, match="0 hits"):
        set_score("A", meta_task="vqa", in_distribution=True, hits=[], num_candidates=[])
    with pytest.raises(ValueError, match="0 patterns"):
        mmvp_report([], [])
