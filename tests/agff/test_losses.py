from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agff.losses import ega_loss, ega_weights, info_nce

TAU = 0.07


def similarities(rows: int = 4, candidates: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, candidates, dtype=torch.float64, generator=generator) * 2 - 1


POSITIVE = torch.tensor([2, 0, 6, 3])
MASK = torch.rand(4, 7, generator=torch.Generator().manual_seed(5)) > 0.3


def oracle(
    similarity: Tensor, positive: Tensor, amplification: float, width: float, renormalize: bool, mask: Tensor
) -> tuple[float, Tensor]:
    """README, Method 2, row by row and term by term: (value, gradient with respect to the similarity)."""
    num_rows, num_candidates = similarity.shape
    value, gradient = 0.0, torch.zeros_like(similarity)
    for i in range(num_rows):
        p, s = int(positive[i]), similarity[i].tolist()
        allowed = [j for j in range(num_candidates) if j == p or mask[i, j]]
        total = sum(math.exp(s[j] / TAU) for j in allowed)
        prob = {j: math.exp(s[j] / TAU) / total for j in allowed}
        value -= math.log(prob[p]) / num_rows
        weight = {
            j: 1.0 if j == p else 1 + amplification * math.exp(-abs(s[j] - s[p]) / width) for j in allowed
        }
        amplified = {j: weight[j] * prob[j] for j in allowed}
        if renormalize:
            norm = sum(amplified.values())
            amplified = {j: a / norm for j, a in amplified.items()}
        else:
            amplified[p] = 1 - sum(a for j, a in amplified.items() if j != p)
        for j in allowed:
            gradient[i, j] = (amplified[j] - (j == p)) / (num_rows * TAU)
    return value, gradient


@pytest.mark.parametrize("amplification", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_value_and_gradient_equal_slow_oracle(amplification: float, renormalize: bool, masked: bool) -> None:
    similarity = similarities().requires_grad_()
    mask = MASK if masked else None
    loss = ega_loss(
        similarity,
        POSITIVE,
        temperature=TAU,
        amplification=amplification,
        width=0.2,
        renormalize=renormalize,
        negative_mask_BC=mask,
    ).mean()
    (gradient,) = torch.autograd.grad(loss, similarity)
    everything = torch.ones(4, 7, dtype=torch.bool)
    expected = oracle(
        similarity.detach(), POSITIVE, amplification, 0.2, renormalize, everything if mask is None else mask
    )
    assert loss.item() == pytest.approx(expected[0], abs=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-12)


def loss_and_gradient(loss_of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    similarity = similarities().to(dtype).requires_grad_()
    loss = loss_of(similarity).mean()
    return loss, *torch.autograd.grad(loss, similarity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_amplification_zero_is_info_nce_bit_for_bit(dtype: torch.dtype) -> None:
    amplified = loss_and_gradient(lambda s: ega_loss(s, POSITIVE, temperature=TAU, amplification=0.0), dtype)
    plain = loss_and_gradient(lambda s: info_nce(s, POSITIVE, temperature=TAU), dtype)
    assert torch.equal(amplified[0], plain[0])
    assert torch.equal(amplified[1], plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_info_nce_is_torchs_cross_entropy(dtype: torch.dtype) -> None:
    """Within rounding: which sum torch takes first depends on the processor's instructions."""
    ours = loss_and_gradient(lambda s: info_nce(s, POSITIVE, temperature=TAU), dtype)
    torchs = loss_and_gradient(lambda s: F.cross_entropy(s / TAU, POSITIVE), dtype)
    torch.testing.assert_close(ours, torchs)


def test_reported_value_is_info_nce_whatever_the_amplification() -> None:
    plain = info_nce(similarities(), POSITIVE, temperature=TAU)
    assert torch.equal(ega_loss(similarities(), POSITIVE, temperature=TAU, amplification=7.0), plain)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_rows_sum_to_zero(renormalize: bool) -> None:
    similarity = similarities().requires_grad_()
    ega_loss(
        similarity, POSITIVE, temperature=TAU, amplification=3.0, renormalize=renormalize
    ).sum().backward()
    assert similarity.grad is not None
    torch.testing.assert_close(
        similarity.grad.sum(dim=1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_without_renormalization_each_negative_is_multiplied_by_exactly_its_weight() -> None:
    gradients = []
    for amplification in (0.0, 3.0):
        similarity = similarities().requires_grad_()
        ega_loss(
            similarity, POSITIVE, temperature=TAU, amplification=amplification, renormalize=False
        ).sum().backward()
        gradients.append(similarity.grad)
    weight = ega_weights(similarities(), POSITIVE, amplification=3.0, width=0.1)
    negative = torch.ones(4, 7, dtype=torch.bool).scatter(1, POSITIVE[:, None], False)
    torch.testing.assert_close(
        gradients[1][negative], (gradients[0] * weight)[negative], rtol=1e-12, atol=1e-16
    )


def test_weight_depends_on_relative_similarity_only_and_grows_towards_the_positive() -> None:
    similarity = torch.tensor([[0.5, -0.4, 0.0, 0.3, 0.45, 0.5]], dtype=torch.float64)
    positive = torch.tensor([0])
    weight = ega_weights(similarity, positive, amplification=2.0, width=0.1)
    torch.testing.assert_close(weight, ega_weights(similarity + 0.3, positive, amplification=2.0, width=0.1))
    assert weight[0, 0] == 1
    assert (weight[0, 1:].diff() > 0).all()
    assert weight[0, 5] == 3


def test_gradcheck_of_info_nce_with_mask() -> None:
    similarity = similarities().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: info_nce(s, POSITIVE, temperature=TAU, negative_mask_BC=MASK), (similarity,)
    )


def test_a_row_without_any_negative_has_no_loss_and_no_gradient() -> None:
    similarity = similarities().requires_grad_()
    loss = ega_loss(
        similarity,
        POSITIVE,
        temperature=TAU,
        amplification=2.0,
        negative_mask_BC=torch.zeros(4, 7, dtype=torch.bool),
    )
    loss.sum().backward()
    assert (loss == 0).all()
    assert similarity.grad is not None
    assert (similarity.grad == 0).all()


def test_low_precision_is_computed_in_float32() -> None:
    similarity = similarities().bfloat16().requires_grad_()
    loss = ega_loss(similarity, POSITIVE, temperature=0.02, amplification=2.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert similarity.grad is not None
    assert similarity.grad.dtype == torch.bfloat16


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="temperature=0 must be > 0"):
        info_nce(similarities(), POSITIVE, temperature=0)
    with pytest.raises(ValueError, match="amplification=-1 must be >= 0"):
        ega_loss(similarities(), POSITIVE, temperature=TAU, amplification=-1)
    with pytest.raises(ValueError, match="width=0 must be > 0"):
        ega_loss(similarities(), POSITIVE, temperature=TAU, amplification=1, width=0)
    with pytest.raises(ValueError, match="hardness_weight=-1 must be >= 0"):
        info_nce(similarities(), POSITIVE, temperature=TAU, hardness_weight=-1)
    with pytest.raises(ValueError, match=r"mask \(7, 4\) does not fit \(4, 7\)"):
        info_nce(similarities(), POSITIVE, temperature=TAU, negative_mask_BC=MASK.T)
    with pytest.raises(ValueError, match=r"expected \(B, C\) and \(B,\), got \(4, 7\) and \(3,\)"):
        info_nce(similarities(), POSITIVE[:3], temperature=TAU)
