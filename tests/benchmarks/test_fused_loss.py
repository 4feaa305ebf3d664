"""The benchmark's naive baseline is the same mathematics, and the benchmark runs."""

from __future__ import annotations

import pytest
import torch

from agff.fused_loss import BLOCK_ELEMENTS, STATISTICS, block_elements
from tests.benchmarks.fused_loss import Size, forward_backward, loss_rows, main, make_inputs, peak_apart

SLACK_BYTES = 2**24
"""Of the allocator, and for masks."""


def size(rows: int, candidates: int, k: int, dim: int) -> Size:
    return Size(rows=rows, candidates=candidates, k=k, dim=dim, device="cpu", threads=1)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_naive_and_ours_have_equal_loss_and_gradient(k: int) -> None:
    results = []
    for method in ("naive", "ours"):
        inputs = [
            tensor.detach().double().requires_grad_()
            for tensor in make_inputs(3, 7, k, 8, torch.device("cpu"))
        ]
        results.append((forward_backward(method, inputs[0], inputs[1]), *[tensor.grad for tensor in inputs]))
    # float32: the naive baseline computes in it
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for naive, ours in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(naive, ours, rtol=1e-4, atol=1e-5)


def test_memory_of_ours_is_its_block_where_naive_grows() -> None:
    small = size(64, 4096, 4, 32)
    naive, ours = (peak_apart(method, small) for method in ("naive", "ours"))
    one_copy = 4 * 64 * 4096 * 25
    assert naive["peak_bytes"] > 3 * one_copy
    assert ours["peak_bytes"] < 4 * block_elements(64, 4096, 5) + small.gradient_bytes + SLACK_BYTES


def test_memory_of_ours_does_not_grow_with_the_rows_beyond_one_block() -> None:
    large = size(2560, 2560, 1, 8)
    assert 4 * large.rows * large.candidates * (4 + STATISTICS) > 3 * 4 * BLOCK_ELEMENTS
    peak = peak_apart("ours", large)["peak_bytes"]
    assert peak < 4 * BLOCK_ELEMENTS + large.gradient_bytes + SLACK_BYTES


def test_rows_hold_the_ratio_to_the_products_and_the_peak() -> None:
    (row,) = loss_rows([size(8, 64, 4, 8)], repeats=2)
    assert row["candidates"] == 64
    assert row["ratio"] > 0
    assert row["products_s"] > 0
    assert row["ours_peak_bytes"] >= 0
    assert "naive_s" not in row


def test_what_does_not_fit_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--candidates", "64", "--rows", "8", "--dim", "8", "--device", "cpu", "--repeats", "1"]
    main([*arguments, "--threads", "1", "--naive_limit_gib", "0"])
    assert "skipped" in capsys.readouterr().out
