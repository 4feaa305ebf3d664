"""R@k and choices: against slow loops, ties, and every way a call can be wrong."""

from __future__ import annotations

import pytest
import torch

from agff import recall
from agff.recall import choice_score, mean_choices, places, places_in_blocks, recall_score


def slow_place(scores: list[float], own: list[int]) -> int:
    best = max(scores[column] for column in own)
    return sum(not score < best for column, score in enumerate(scores) if column not in own)


def random_case(seed: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Coarse similarities, so that there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    similarity_BC = torch.randint(-5, 6, (30, 40), generator=generator) / 5
    own = [torch.randperm(40, generator=generator)[: 1 + row % 4].tolist() for row in range(30)]
    return similarity_BC, own


@pytest.mark.parametrize("seed", range(3))
def test_places_equal_the_slow_count(seed: int) -> None:
    similarity_BC, own = random_case(seed)
    expected = [slow_place(row.tolist(), columns) for row, columns in zip(similarity_BC, own, strict=True)]
    assert places(similarity_BC, own) == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("num_elements", [1, 41, 80, 10_000])
def test_blocks_do_not_change_places_and_bound_memory(
    monkeypatch: pytest.MonkeyPatch, num_elements: int
) -> None:
    monkeypatch.setattr(recall, "BLOCK_ELEMENTS", num_elements)
    similarity_BC, own = random_case(0)
    sizes: list[int] = []

    def block(rows: slice) -> torch.Tensor:
        sizes.append(similarity_BC[rows].numel())
        return similarity_BC[rows]

    assert places_in_blocks(block, own, num_candidates=40) == places(similarity_BC, own)
    assert max(sizes) <= max(num_elements, 40)
    assert sum(sizes) == similarity_BC.numel()


def test_a_tie_and_nan_are_misses() -> None:
    nan = float("nan")
    rows = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [nan, 0.0, 0.0], [1.0, nan, 0.0]])
    assert places(rows, [[0]] * 4) == [0, 1, 3, 1]
    assert places(torch.ones(1, 5), [[0]]) == [4]


def test_one_of_its_own_among_the_best_is_a_hit() -> None:
    # the best of its own counts, its other ones are never ahead of it
    assert places(torch.tensor([[0.1, 0.9, 0.5, 0.9]]), [[1, 3]]) == [0]
    assert places(torch.tensor([[0.1, 0.4, 0.5, 0.3]]), [[1, 3]]) == [1]


def test_recall_counts_places_below_k() -> None:
    score = recall_score(
        [0, 1, 4, 5, 9, 10],
        [1, 1, 1, 1, 2, 2],
        direction="text to image",
        similarity="fused",
        num_candidates=20,
    )
    shares = (score.recall_at_1, score.recall_at_5, score.recall_at_10)
    assert shares == pytest.approx((100 / 6, 50, 500 / 6))
    assert score.chance_at_1 == pytest.approx(100 * 8 / 20 / 6)
    assert (score.num_queries, score.num_candidates) == (6, 20)


def test_choice_is_strict_and_means_count_subsets_alike() -> None:
    own_P = torch.tensor([0.5, 0.5, 0.1, float("nan")])
    negative_P = torch.tensor([0.4, 0.5, 0.2, 0.0])
    first = choice_score(own_P, negative_P, subset="swap_obj", similarity="fused")
    assert (first.score, first.chance, first.num_pairs) == (25, 50, 4)
    second = choice_score(own_P[:1], negative_P[:1], subset="swap_att", similarity="fused")
    mean = mean_choices("mean swap", [first, second])
    assert (mean.score, mean.num_pairs, mean.similarity) == (62.5, 5, "fused")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(2, C\) and an own candidate"):
        places(torch.zeros(3, 4), [[0], [1]])
    with pytest.raises(ValueError, match="own candidate of each query"):
        places(torch.zeros(2, 4), [[0], []])
    with pytest.raises(ValueError, match="0 places"):
        recall_score([], [], direction="d", similarity="s", num_candidates=3)
    with pytest.raises(ValueError, match=r"expected two of \(P,\)"):
        choice_score(torch.zeros(2), torch.zeros(3), subset="s", similarity="s")
