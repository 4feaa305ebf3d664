"""Which candidates act as negatives, against a slow choice by hand; and what the objective makes of it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import agff
from agff.losses import ega_loss, info_nce
from agff.negatives import hardest_negative_mask, negative_mask

TAU, ALPHA = 0.3, 2.0
POSITIVE = torch.tensor([2, 0, 6, 3])
MARGINS = (None, -0.1, 0.0, 0.1, 0.5)
NUMBERS = (None, 1, 2, 3, 6, 7, 100)


def similarities(seed: int = 0) -> Tensor:
    """On a grid of 0.1, so that many are equal, also to the positive plus a margin."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-10, 11, (4, 7), generator=generator).double() / 10


def masks() -> list[Tensor | None]:
    some = torch.rand(4, 7, generator=torch.Generator().manual_seed(5)) > 0.3
    some[1] = False  # a row without any negative
    return [None, some]


def slow_choice(
    similarity: Tensor, margin: float | None, num_hardest: int | None, mask: Tensor | None
) -> list[list[int]]:
    """Of each row the candidates that act, by definition."""
    chosen = []
    for i, row in enumerate(similarity.tolist()):
        own = row[int(POSITIVE[i])]
        allowed = [
            j
            for j in range(len(row))
            if j != POSITIVE[i]
            and (mask is None or bool(mask[i, j]))
            and (margin is None or row[j] <= own + margin)
        ]
        hardest = sorted(allowed, key=lambda j: (-row[j], j))
        chosen.append(sorted(hardest[:num_hardest]))
    return chosen


def choice(mask_BC: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask_BC]


@pytest.mark.parametrize(("margin", "num_hardest"), list(product(MARGINS, NUMBERS)))
def test_the_mask_equals_a_slow_choice_with_many_equal_similarities(
    margin: float | None, num_hardest: int | None
) -> None:
    for seed, mask in product(range(20), masks()):
        similarity = similarities(seed)
        found = agff.hardest_negative_mask(
            similarity, POSITIVE, margin=margin, num_hardest=num_hardest, negative_mask_BC=mask
        )
        assert found.dtype == torch.bool
        assert choice(found) == slow_choice(similarity, margin, num_hardest, mask)


def test_fewer_survivors_than_wanted_bring_nothing_back() -> None:
    similarity = torch.tensor([[0.5, 0.9, 0.8, 0.2], [0.5, 0.9, 0.8, 0.7]])
    found = hardest_negative_mask(similarity, torch.tensor([0, 0]), margin=0.1, num_hardest=3)
    assert choice(found) == [[3], []]


def test_the_mask_has_no_gradient_and_changes_no_argument() -> None:
    similarity, mask = similarities().requires_grad_(), torch.ones(4, 7, dtype=torch.bool)
    before = similarity.detach().clone()
    found = hardest_negative_mask(similarity, POSITIVE, margin=0.0, num_hardest=2, negative_mask_BC=mask)
    assert not found.requires_grad
    assert mask.all()
    assert torch.equal(similarity.detach(), before)


@pytest.mark.parametrize(("row", "column"), [(0, 2), (0, 1)], ids=["positive", "candidate"])
def test_a_similarity_that_is_no_number_is_not_filtered_out_of_sight(row: int, column: int) -> None:
    similarity = similarities()
    similarity[row, column] = torch.nan
    mask = hardest_negative_mask(similarity, POSITIVE, margin=0.1, num_hardest=1)
    loss = info_nce(similarity, POSITIVE, temperature=TAU, negative_mask_BC=mask)
    assert loss[0].isnan()
    assert loss[1:].isfinite().all()


def test_low_precision_is_compared_in_float32() -> None:
    # 0.5 + 0.1 is 0.6015625 in bfloat16 and lets 0.6015625 pass
    similarity = torch.tensor([[0.5, 0.6015625]], dtype=torch.bfloat16)
    found = hardest_negative_mask(similarity, torch.tensor([0]), margin=0.1, num_hardest=None)
    assert choice(found) == [[]]


def test_wrong_arguments_of_the_mask_are_named() -> None:
    with pytest.raises(ValueError, match="num_hardest=0 must be >= 1"):
        hardest_negative_mask(similarities(), POSITIVE, margin=None, num_hardest=0)
    with pytest.raises(ValueError, match=r"expected \(B, C\) and \(B,\), got \(4, 7\) and \(3,\)"):
        hardest_negative_mask(similarities(), POSITIVE[:3], margin=None, num_hardest=None)
    mask = torch.ones(7, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask \(7, 4\) does not fit \(4, 7\)"):
        hardest_negative_mask(similarities(), POSITIVE, margin=None, num_hardest=None, negative_mask_BC=mask)


def slow_loss_and_gradient(
    similarity: Tensor, margin: float | None, num_hardest: int | None, alpha: float, amplification: float
) -> tuple[list[float], Tensor]:
    """Term by term: a negative counts exp(alpha * s) times, and its gradient 1 + amplification * h times."""
    losses, gradient = [], torch.zeros_like(similarity)
    for i, acting in enumerate(slow_choice(similarity, margin, num_hardest, None)):
        p, s = int(POSITIVE[i]), similarity[i].tolist()
        count = {p: math.exp(s[p] / TAU)} | {j: math.exp(s[j] / TAU + alpha * s[j]) for j in acting}
        total = sum(count.values())
        losses.append(-math.log(count[p] / total))
        for j in acting:
            count[j] *= 1 + amplification * math.exp(-abs(s[j] - s[p]) / 0.1)
        total = sum(count.values())
        for j, part in count.items():
            gradient[i, j] = (part / total - (j == p)) / TAU
    return losses, gradient


TREATMENTS = list(product((None, 0.1), (None, 2), (0.0, ALPHA), (0.0, 2.0)))


@pytest.mark.parametrize(("margin", "num_hardest", "alpha", "amplification"), TREATMENTS)
def test_loss_and_gradient_equal_a_slow_oracle(
    margin: float | None, num_hardest: int | None, alpha: float, amplification: float
) -> None:
    similarity = similarities().requires_grad_()
    mask = hardest_negative_mask(similarity, POSITIVE, margin=margin, num_hardest=num_hardest)
    loss_B = ega_loss(
        similarity,
        POSITIVE,
        temperature=TAU,
        amplification=amplification,
        negative_mask_BC=mask,
        hardness_weight=alpha,
    )
    (gradient,) = torch.autograd.grad(loss_B.sum(), similarity)
    losses, expected = slow_loss_and_gradient(similarity.detach(), margin, num_hardest, alpha, amplification)
    assert loss_B.tolist() == pytest.approx(losses, abs=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_gradcheck_of_filtered_rows() -> None:
    """The weights on logits are not in it: their gradient is left out on purpose."""

    def loss(similarity: Tensor) -> Tensor:
        mask = hardest_negative_mask(similarity, POSITIVE, margin=0.1, num_hardest=2)
        return info_nce(similarity, POSITIVE, temperature=TAU, negative_mask_BC=mask)

    # off the grid, so that no step of gradcheck changes a choice
    similarity = similarities() + torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) / 30
    assert torch.autograd.gradcheck(loss, (similarity.double().requires_grad_(),))


def test_pairs_that_share_a_target_or_a_query_are_no_negatives() -> None:
    query_ids, target_ids = torch.tensor([1, 2, 3, 1]), torch.tensor([10, 20, 10, 40])
    mask = negative_mask(query_ids, target_ids, target_ids, query_ids)
    for i in range(4):
        for j in range(4):
            assert mask[i, j] == (target_ids[i] != target_ids[j] and query_ids[i] != query_ids[j])
