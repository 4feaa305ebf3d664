from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import agff
from agff import similarity
from agff.similarity import fused_similarity, fused_similarity_to_own, pattern_shares


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def oracle_patterns(query_MD: Tensor, target_MD: Tensor, beta: float) -> list[float]:
    """README, Method 1 for one pair, term by term, in Python floats."""
    u, f = query_MD[0], query_MD[1:]
    v, g = target_MD[0], target_MD[1:]

    def log_mean_exp(similarities: list[float]) -> float:
        return beta * math.log(sum(math.exp(s / beta) for s in similarities) / len(similarities))

    if len(f) == 0:
        return [float(u @ v)]
    return [
        float(u @ v),
        log_mean_exp([float(f_m @ v) for f_m in f]),
        log_mean_exp([float(u @ g_n) for g_n in g]),
        log_mean_exp([float(f_m @ g_n) for f_m, g_n in product(f, g)]),
    ]


def oracle(query_BMD: Tensor, target_CMD: Tensor, beta: float) -> Tensor:
    rows = []
    for query_MD in query_BMD:
        row = []
        for target_MD in target_CMD:
            patterns = oracle_patterns(query_MD, target_MD, beta)
            row.append(beta * math.log(sum(math.exp(s / beta) for s in patterns) / len(patterns)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("num_fine", [0, 1, 4])
@pytest.mark.parametrize("beta", [0.02, 0.05, 0.3])
def test_fused_similarity_equals_slow_oracle(num_fine: int, beta: float) -> None:
    query, target = unit(3, 1 + num_fine, 8), unit(5, 1 + num_fine, 8, seed=1)
    torch.testing.assert_close(
        fused_similarity(query, target, beta=beta), oracle(query, target, beta), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("num_fine", [0, 1, 4])
def test_similarity_to_own_candidates_equals_slow_oracle(num_fine: int) -> None:
    query_BMD, own_BCMD = unit(3, 1 + num_fine, 6), unit(3, 5, 1 + num_fine, 6, seed=1)
    expected = torch.cat([oracle(query_BMD[[row]], own_BCMD[row], 0.05) for row in range(3)])
    torch.testing.assert_close(fused_similarity_to_own(query_BMD, own_BCMD, beta=0.05), expected)


def test_shapes_and_beta_of_own_candidates_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, M, D\) and \(B, C, M, D\), got \(2, 1, 4\)"):
        fused_similarity_to_own(unit(2, 1, 4), unit(2, 3, 2, 4), beta=0.05)
    with pytest.raises(ValueError, match="beta=0 must be > 0"):
        fused_similarity_to_own(unit(2, 1, 4), unit(2, 3, 1, 4), beta=0)


def test_result_and_gradient_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = unit(4, 7, seed=2)
    results = []
    for block_elements in (1, 4 * 25 * 2, 10**9):
        monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", block_elements)
        query, target = unit(4, 5, 6).requires_grad_(), unit(7, 5, 6, seed=1).requires_grad_()
        fused = fused_similarity(query, target, beta=0.05)
        results.append((fused.detach(), *torch.autograd.grad((fused * weight).sum(), (query, target))))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_fine", [0, 1, 3])
def test_gradcheck(num_fine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", 2 * 16 * 2)
    query, target = (
        unit(2, 1 + num_fine, 4).requires_grad_(),
        unit(5, 1 + num_fine, 4, seed=1).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda q, t: fused_similarity(q, t, beta=0.1), (query, target))


def test_without_fine_vectors_it_is_the_dot_product_exactly() -> None:
    query, target = unit(3, 1, 8).float(), unit(5, 1, 8, seed=1).float()
    assert torch.equal(fused_similarity(query, target, beta=0.05), query[:, 0] @ target[:, 0].T)


def test_fusion_lies_between_mean_and_maximum_of_the_patterns() -> None:
    query, target = unit(3, 5, 8), unit(4, 5, 8, seed=1)
    fused = fused_similarity(query, target, beta=0.05)
    for b, c in product(range(3), range(4)):
        patterns = oracle_patterns(query[b], target[c], 0.05)
        assert sum(patterns) / 4 - 1e-12 <= fused[b, c] <= max(patterns) + 1e-12


def test_identical_vectors_score_one_and_symmetric_arguments_agree() -> None:
    one = unit(1, 1, 8).expand(1, 5, 8)
    torch.testing.assert_close(fused_similarity(one, one, beta=0.05), torch.ones(1, 1, dtype=torch.float64))
    a, b = unit(3, 5, 8), unit(4, 5, 8, seed=1)
    torch.testing.assert_close(fused_similarity(a, b, beta=0.05), fused_similarity(b, a, beta=0.05).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_comes_in_and_float32_comes_out(dtype: torch.dtype) -> None:
    query, target = unit(3, 5, 8).to(dtype), unit(4, 5, 8, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the inside
        fused = fused_similarity(query, target, beta=0.05)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(
        fused, oracle(query.double(), target.double(), 0.05).float(), rtol=0, atol=2e-6
    )


def test_gradient_flows_into_low_precision_arguments() -> None:
    query = unit(3, 5, 8).bfloat16().requires_grad_()
    fused_similarity(query, unit(4, 5, 8, seed=1).bfloat16(), beta=0.05).sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.bfloat16


def test_pattern_shares_are_the_derivatives_of_the_fusion() -> None:
    query, target = unit(1, 5, 8), unit(1, 5, 8, seed=1)
    patterns = torch.tensor(oracle_patterns(query[0], target[0], 0.05), dtype=torch.float64)
    expected = (patterns / 0.05).softmax(dim=0)
    torch.testing.assert_close(pattern_shares(query, target, beta=0.05), expected, rtol=1e-12, atol=1e-12)
    assert pattern_shares(query[:, :1], target[:, :1], beta=0.05).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_wrong_shapes_and_beta_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(B, M, D\).*\(3, 5, 8\) and \(4, 2, 8\)"):
        fused_similarity(unit(3, 5, 8), unit(4, 2, 8), beta=0.05)
    with pytest.raises(ValueError, match="beta=0 must be > 0"):
        fused_similarity(unit(3, 5, 8), unit(4, 5, 8), beta=0)


def test_public_names() -> None:
    assert agff.fused_similarity is fused_similarity
    assert callable(agff.ega_loss)
    assert callable(agff.load)
