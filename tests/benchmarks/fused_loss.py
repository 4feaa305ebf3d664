"""`python tests/benchmarks/fused_loss.py`: time and peak memory of fused similarity + EGA loss, forward and
backward.

naive: all M x M pairs of vectors of all candidates at once, in plain autograd, straight from README, Method
1.
ours:  agff.similarity.fused_similarity and agff.losses.ega_loss.

Peak memory is what the computation needs beyond its inputs; the gradients of the inputs, which no method can
do without, are part of it and stand in a column of their own. On CUDA: torch.cuda.max_memory_allocated minus
what was allocated before. On a CPU every measurement has a process of its own: the kernel's high-water mark
of its resident memory (VmHWM, reset after the inputs exist and a small warm-up ran) minus the resident memory
at that moment; memory that the allocator had kept from before would be missed, and there is hardly any. Time
is the best of --repeats after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from agff.losses import ega_loss
from agff.similarity import fused_similarity

BETA, TEMPERATURE, AMPLIFICATION = 0.05, 0.02, 1.0
NAIVE_COPIES = 7
"""Tensors of B x M x C x M elements that plain autograd holds at its peak: an estimate, to skip what cannot
fit."""


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


METHODS: dict[str, Callable[..., Tensor]] = {"naive": naive_similarity, "ours": fused_similarity}


def forward_backward(method: str, query_BMD: Tensor, target_CMD: Tensor) -> float:
    """The loss; the gradients stay on the inputs."""
    query_BMD.grad = target_CMD.grad = None
    similarity_BC = METHODS[method](query_BMD, target_CMD, beta=BETA)
    positive_index_B = torch.arange(query_BMD.shape[0], device=query_BMD.device)
    loss = ega_loss(
        similarity_BC, positive_index_B, temperature=TEMPERATURE, amplification=AMPLIFICATION
    ).mean()
    loss.backward()
    return loss.item()


def make_inputs(rows: int, candidates: int, k: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors that need a gradient, the same for both methods; row i's positive is candidate i."""
    generator = torch.Generator().manual_seed(0)
    target_CMD = F.normalize(torch.randn(candidates, 1 + k, dim, generator=generator), dim=-1)
    noise_BMD = F.normalize(torch.randn(rows, 1 + k, dim, generator=generator), dim=-1)
    query_BMD = F.normalize(0.1 * target_CMD[:rows] + noise_BMD, dim=-1)
    return query_BMD.to(device).requires_grad_(), target_CMD.to(device).requires_grad_()


def measure(
    method: str, rows: int, candidates: int, k: int, dim: int, device: torch.device, repeats: int
) -> dict[str, float]:
    """{"loss", "gradient_norm", "time_s", "peak_bytes"} of one method at one size, in this process."""
    forward_backward(method, *make_inputs(2, 4, k, dim, device))
    inputs = make_inputs(rows, candidates, k, dim, device)
    before = _reset_peak(device)
    loss = forward_backward(method, *inputs)
    peak_bytes = _peak(device) - before
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        forward_backward(method, *inputs)
        times.append(time.perf_counter() - start)  # .item() in forward_backward waited for a GPU
    grad = inputs[0].grad
    assert grad is not None
    return {"loss": loss, "gradient_norm": float(grad.norm()), "time_s": min(times), "peak_bytes": peak_bytes}


def measure_apart(method: str, rows: int, candidates: int, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own, so that no measurement inherits another's memory."""
    command = [
        sys.executable,
        __file__,
        "--child",
        method,
        "--rows",
        str(rows),
        "--candidates",
        str(candidates),
    ]
    command += ["--k", str(arguments.k), "--dim", str(arguments.dim), "--device", arguments.device]
    command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


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


def _print_row(candidates: int, rows: int, gradient_bytes: int, results: dict[str, dict[str, float]]) -> None:
    ours, naive = results["ours"], results.get("naive")
    cells = [f"{candidates:>10,}  {rows:>6,}  {gradient_bytes / 2**20:>9,.0f} MiB"]
    for name in ("naive", "ours"):
        result = results.get(name)
        cells.append(
            f"{result['time_s']:>9.3f} s {result['peak_bytes'] / 2**20:>10,.0f} MiB"
            if result
            else f"{'skipped':>26}"
        )
    if naive:
        difference = max(abs(ours[key] - naive[key]) / abs(naive[key]) for key in ("loss", "gradient_norm"))
        cells.append(
            f"{naive['time_s'] / ours['time_s']:>7.1f}x {naive['peak_bytes'] / ours['peak_bytes']:>7.1f}x"
        )
        cells.append(f"{difference:>9.0e}")
    sys.stdout.write("  ".join(cells) + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[1024, 4096, 8192], help="C, one table row each"
    )
    parser.add_argument("--rows", type=int, default=256, help="B, local queries (default: %(default)s)")
    parser.add_argument(
        "--k", type=int, default=4, help="fine-grained vectors of each item (default: %(default)s)"
    )
    parser.add_argument("--dim", type=int, default=256, help="width of a vector (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)"
    )
    parser.add_argument("--naive_limit_gib", type=float, default=24, help="skip naive above this estimate")
    parser.add_argument("--child", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.child:
        size = (arguments.rows, arguments.candidates[0], arguments.k, arguments.dim)
        sys.stdout.write(json.dumps(measure(arguments.child, *size, device, arguments.repeats)) + "\n")
        return 0
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {arguments.threads} threads"
    )
    sys.stdout.write(
        f"{name}, torch {torch.__version__}, float32, K={arguments.k}, D={arguments.dim}, forward + "
        "backward\n"
    )
    sys.stdout.write(
        "candidates    rows   input grads        naive: time, peak           ours: time, peak    time   "
        "memory  difference\n"
    )
    for candidates in arguments.candidates:
        rows = min(arguments.rows, candidates)
        naive_bytes = NAIVE_COPIES * 4 * rows * candidates * (1 + arguments.k) ** 2
        methods = list(METHODS) if naive_bytes <= arguments.naive_limit_gib * 2**30 else ["ours"]
        gradient_bytes = 4 * (rows + candidates) * (1 + arguments.k) * arguments.dim
        results = {method: measure_apart(method, rows, candidates, arguments) for method in methods}
        _print_row(candidates, rows, gradient_bytes, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
