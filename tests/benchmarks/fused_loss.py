"""`python tests/benchmarks/fused_loss.py`: time and peak memory of the loss, forward and backward.

ours:     agff.fused_loss: fused similarity, content mask, InfoNCE and EGA, with the gradients of all vectors.
products: the three matrix products that no method can do without, alone: all pairs of vectors, and from a
          matrix of their size the gradients of both sides; results in memory that is there already.
naive:    all M x M pairs of all candidates at once, in plain autograd, straight from README, Method 1.

Times are taken in turn in one process; shown are medians, and the median of the rounds' ratios to the
products. Peak memory is what the computation needs beyond its inputs; the gradients of the inputs are part of
it and stand in a column of their own. On CUDA: torch.cuda.max_memory_allocated minus what was allocated
before. On a CPU every measurement of memory has a process of its own: the kernel's high-water mark of its
resident memory (VmHWM, reset after the inputs exist and a small warm-up ran) minus the resident memory at
that moment; memory that the allocator had kept from before would be missed, and there is hardly any.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agff.fused_loss import fused_loss
from agff.losses import ega_loss
from agff.negatives import negative_mask

BETA, TEMPERATURE, AMPLIFICATION, WIDTH = 0.05, 0.02, 1.0, 0.1
NAIVE_COPIES = 7
"""Tensors of B x M x C x M elements that plain autograd holds at its peak: an estimate, to skip what cannot
fit."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is compared with what, and where."""

    rows: int
    candidates: int
    k: int
    dim: int
    device: str
    threads: int

    @property
    def gradient_bytes(self) -> int:
        """Of both sides."""
        return 4 * (self.rows + self.candidates) * (1 + self.k) * self.dim

    @property
    def naive_bytes(self) -> int:
        """Estimate."""
        return NAIVE_COPIES * 4 * self.rows * self.candidates * (1 + self.k) ** 2


def naive_similarity(query_BMD: Tensor, target_CMD: Tensor, *, beta: float) -> Tensor:
    """(B, C) fused similarity, every pattern written out."""
    num_fine = query_BMD.shape[1] - 1
    pairs_BCMM = torch.einsum("bmd,cnd->bcmn", query_BMD.float(), target_CMD.float()) / beta
    patterns = [pairs_BCMM[..., 0, 0]]
    if num_fine:
        patterns += [
            pairs_BCMM[..., 1:, 0].logsumexp(dim=-1) - math.log(num_fine),
            pairs_BCMM[..., 0, 1:].logsumexp(dim=-1) - math.log(num_fine),
            pairs_BCMM[..., 1:, 1:].logsumexp(dim=(-2, -1)) - 2 * math.log(num_fine),
        ]
    return beta * (torch.stack(patterns).logsumexp(dim=0) - math.log(len(patterns)))


def naive_loss(query_BMD: Tensor, target_CMD: Tensor) -> Tensor:
    """Mean EGA loss; row i's positive is candidate i."""
    own_B = torch.arange(query_BMD.shape[0], device=query_BMD.device)
    similarity_BC = naive_similarity(query_BMD, target_CMD, beta=BETA)
    return ega_loss(
        similarity_BC, own_B, temperature=TEMPERATURE, amplification=AMPLIFICATION, width=WIDTH
    ).mean()


def our_loss(query_BMD: Tensor, target_CMD: Tensor) -> Tensor:
    """The same, as the objective calls it; no two contents are equal."""
    num_rows, num_candidates = query_BMD.shape[0], target_CMD.shape[0]
    ids_C = torch.arange(num_candidates, device=query_BMD.device)
    own_B = ids_C[:num_rows]
    return fused_loss(
        query_BMD,
        target_CMD,
        own_B,
        query_BMD.new_full((num_rows,), 1 / num_rows),
        negatives_of=lambda rows: negative_mask(own_B[rows], own_B[rows], ids_C, ids_C),
        beta=BETA,
        temperature=TEMPERATURE,
        amplification=AMPLIFICATION,
        width=WIDTH,
        renormalize=True,
    )[0]


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"naive": naive_loss, "ours": our_loss}


def forward_backward(method: str, query_BMD: Tensor, target_CMD: Tensor) -> float:
    """The loss; the gradients stay on the inputs."""
    query_BMD.grad = target_CMD.grad = None
    loss = METHODS[method](query_BMD, target_CMD)
    loss.backward()
    return loss.item()


def bare_products(query_BMD: Tensor, target_CMD: Tensor) -> Callable[[], None]:
    """The three products, into memory that is allocated and touched here."""
    query, target = query_BMD.detach().flatten(0, 1), target_CMD.detach().flatten(0, 1)
    pairs = query.new_zeros(query.shape[0], target.shape[0])
    grad_query, grad_target = torch.zeros_like(query), torch.zeros_like(target)

    def products() -> None:
        torch.mm(query, target.T, out=pairs)
        torch.mm(pairs, target, out=grad_query)
        torch.mm(pairs.T, query, out=grad_target)
        if query.is_cuda:
            torch.cuda.synchronize()

    return products


def make_inputs(rows: int, candidates: int, k: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors that need a gradient, the same for all methods; row i's positive is candidate i."""
    generator = torch.Generator().manual_seed(0)
    target_CMD = F.normalize(torch.randn(candidates, 1 + k, dim, generator=generator), dim=-1)
    noise_BMD = F.normalize(torch.randn(rows, 1 + k, dim, generator=generator), dim=-1)
    query_BMD = F.normalize(0.1 * target_CMD[:rows] + noise_BMD, dim=-1)
    return query_BMD.to(device).requires_grad_(), target_CMD.to(device).requires_grad_()


def measure_peak(size: Size, method: str) -> dict[str, float]:
    """{"loss", "gradient_norm", "peak_bytes"} of one method, in this process."""
    device = torch.device(size.device)
    forward_backward(method, *make_inputs(2, 4, size.k, size.dim, device))
    inputs = make_inputs(size.rows, size.candidates, size.k, size.dim, device)
    before = _reset_peak(device)
    loss = forward_backward(method, *inputs)
    peak_bytes = _peak(device) - before
    grad = inputs[0].grad
    assert grad is not None
    return {"loss": loss, "gradient_norm": float(grad.norm()), "peak_bytes": peak_bytes}


def measure_times(size: Size, methods: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of "products" and of each method, one a round, in this process; every other round runs
    backwards."""
    inputs = make_inputs(size.rows, size.candidates, size.k, size.dim, torch.device(size.device))
    runs: dict[str, Callable[[], object]] = {"products": bare_products(*inputs)}
    for method in methods:
        runs[method] = lambda method=method: forward_backward(method, *inputs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):  # the first round is the warm-up
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            runs[name]()  # waits for a GPU: .item() in forward_backward, synchronize in the products
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def loss_rows(sizes: Sequence[Size], *, repeats: int, naive_limit_gib: float = 0) -> list[dict[str, Any]]:
    """One table row a size: seconds of each method, ratio of ours to the products, peaks. Naive runs where it
    is estimated to fit."""
    return [_row(size, repeats, size.naive_bytes <= naive_limit_gib * 2**30) for size in sizes]


def _row(size: Size, repeats: int, with_naive: bool) -> dict[str, Any]:
    methods = ["ours", *["naive"] * with_naive]
    times = _in_child(size, "times", *methods, str(repeats))
    ratios = [ours / bare for ours, bare in zip(times["ours"], times["products"], strict=True)]
    row = asdict(size) | {
        "gradient_bytes": size.gradient_bytes,
        "products_s": statistics.median(times["products"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    for method in methods:
        row[f"{method}_s"] = statistics.median(times[method])
        row |= {f"{method}_{key}": value for key, value in peak_apart(method, size).items()}
    return row


def peak_apart(method: str, size: Size) -> dict[str, float]:
    """`measure_peak` in a process of its own, so that no measurement inherits another's memory."""
    return _in_child(size, "peak", method)


def _in_child(size: Size, *order: str) -> Any:
    command = [sys.executable, __file__, "--child", json.dumps(asdict(size)), *order]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(size: Size, what: str, *arguments: str) -> None:
    torch.set_num_threads(size.threads)
    if what == "peak":
        result: Any = measure_peak(size, *arguments)
    else:
        result = measure_times(size, arguments[:-1], int(arguments[-1]))
    sys.stdout.write(json.dumps(result) + "\n")


def _reset_peak(device: torch.device) -> int:
    """Bytes in use now, from which the peak is counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: set the high-water mark to what is resident now
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


HEADER = "  dim    rows  candidates  input grads     products                    ours                   naive"


def _line(row: dict[str, Any]) -> str:
    cells = f"{row['dim']:>5}  {row['rows']:>6,}  {row['candidates']:>10,}  "
    cells += f"{row['gradient_bytes'] / 2**20:>7,.0f} MiB  {row['products_s']:>9.3f} s  "
    cells += f"{row['ours_s']:>8.3f} s {row['ours_peak_bytes'] / 2**20:>6,.0f} MiB {row['ratio']:>6.2f} x"
    if "naive_s" not in row:
        return f"{cells}  skipped"
    keys = ("loss", "gradient_norm")
    difference = max(abs(row[f"ours_{key}"] / row[f"naive_{key}"] - 1) for key in keys)
    cells += f"  {row['naive_s']:>8.3f} s {row['naive_peak_bytes'] / 2**20:>6,.0f} MiB"
    return f"{cells}, differs by {difference:.0e}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[8192], help="C, table rows (default: %(default)s)"
    )
    parser.add_argument(
        "--dim",
        type=int,
        nargs="+",
        default=[256, 1536],
        help="widths of a vector, table rows (default: %(default)s)",
    )
    parser.add_argument("--rows", type=int, default=256, help="B, local queries (default: %(default)s)")
    parser.add_argument(
        "--k", type=int, default=4, help="fine-grained vectors of each item (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)"
    )
    parser.add_argument("--naive_limit_gib", type=float, default=24, help="skip naive above this estimate")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.child:
        _child(Size(**json.loads(arguments.child[0])), *arguments.child[1:])
        return 0
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    sys.stdout.write(f"{name}, {arguments.threads} threads, torch {torch.__version__}, K={arguments.k}\n")
    sys.stdout.write(HEADER + "\n")
    for dim in arguments.dim:
        for candidates in arguments.candidates:
            size = Size(
                rows=min(arguments.rows, candidates),
                candidates=candidates,
                k=arguments.k,
                dim=dim,
                device=device,
                threads=arguments.threads,
            )
            (row,) = loss_rows([size], repeats=arguments.repeats, naive_limit_gib=arguments.naive_limit_gib)
            sys.stdout.write(_line(row) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
