"""The benchmark's naive baseline is the same mathematics, and the benchmark runs."""

from __future__ import annotations

import argparse

import pytest
import torch

from tests.benchmarks.fused_loss import forward_backward, main, make_inputs, measure_apart


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


def test_memory_of_ours_is_bounded_where_naive_grows() -> None:
    arguments = argparse.Namespace(k=4, dim=32, device="cpu", repeats=1, threads=1)
    naive, ours = (measure_apart(method, 64, 4096, arguments) for method in ("naive", "ours"))
    one_copy = 4 * 64 * 4096 * 25
    assert naive["peak_bytes"] > 3 * one_copy
    # two blocks (33 MB each), gradient and similarity (4 MB in all), and the slack of an allocator
    assert ours["peak_bytes"] < 2 * 2**25 + 2**24


def test_what_does_not_fit_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--candidates", "64", "--rows", "8", "--dim", "8"]
    main([*size, "--device", "cpu", "--repeats", "1", "--threads", "1", "--naive_limit_gib", "0"])
    assert "skipped" in capsys.readouterr().out
