"""AGFF-Embed's whole objective, forward and backward, beside the three matrix products that it cannot do
without: the similarities of all pairs of vectors, and the gradients of both sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from agff.batch import Batch
from agff.objectives.contrastive import Contrastive
from agff.similarity import FusionConfig
from tests.benchmarks.memory import peak_bytes, reset_peak
from tests.benchmarks.table import Row
from tests.benchmarks.turns import Ratio
from tests.ranks import run_ranks

OBJECTIVE, FUSION = Contrastive(temperature=0.02, amplification=1.0), FusionConfig(beta=0.05)
NUM_VECTORS = 5
"""K = 4."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveCost:
    """What was measured."""

    ratio: Ratio
    """Time / that of the products."""
    seconds: float
    peak_bytes: int
    """Beyond the inputs; the gradients of the inputs are part of it."""


def objective_rows(*, quick: bool) -> list[Row]:
    """At two widths, on the CPU, in processes of their own."""
    num_rows, num_candidates, widths, rounds = (16, 64, (32,), 3) if quick else (256, 8192, (256, 1536), 9)
    rows = []
    for dim in widths:
        arguments = (num_rows, num_candidates, dim, rounds)
        cost = run_ranks(objective_cost, *arguments, world_size=1, timeout_s=600)[0]
        rows.append(
            Row.of(
                cost.ratio,
                group="loss",
                what=f"objective at {num_rows} x {num_candidates:,}, K = {NUM_VECTORS - 1}",
                case=f"D = {dim:,}",
                against="its three matrix products",
                quantity="time",
                note=f"{cost.seconds:.3f} s, {cost.peak_bytes / 2**20:,.0f} MiB",
            )
        )
    return rows


def objective_cost(
    num_rows: int, num_candidates: int, dim: int, rounds: int, device: str = "cpu"
) -> ObjectiveCost:
    """`num_rows` queries against their targets and explicit negatives, in turn with the bare products."""
    torch.set_num_threads(2)
    sides = [
        functional.normalize(torch.randn(rows, NUM_VECTORS, dim, device=device), dim=-1).requires_grad_()
        for rows in (num_rows, num_rows, num_candidates - num_rows)
    ]
    batch = _batch(num_rows, num_candidates - num_rows).to(torch.device(device))

    def ours() -> None:
        result = OBJECTIVE(*({"embedding": side} for side in sides), batch, FUSION)
        torch.autograd.grad(result.loss, sides)

    query = sides[0].detach().flatten(0, 1)
    candidates = torch.cat(sides[1:]).detach().flatten(0, 1)

    def products() -> None:
        similarities = query @ candidates.T
        _ = similarities @ candidates, similarities.T @ query

    peak = _peak_of(ours, device)
    products()
    times: dict[str, list[float]] = {"ours": [], "products": []}
    for number in range(rounds):
        turns = [("ours", ours), ("products", products)]
        for name, run in turns if number % 2 == 0 else reversed(turns):
            times[name].append(_seconds(run, device))
    ratio = Ratio.of(times["ours"], times["products"])
    return ObjectiveCost(ratio=ratio, seconds=sorted(times["ours"])[rounds // 2], peak_bytes=peak)


def _batch(num_rows: int, num_negatives: int) -> Batch:
    """Ids without a pair in common; nothing to encode."""
    num_items = 2 * num_rows + num_negatives
    ids = torch.arange(num_items)
    return Batch(
        chunks=(),
        row_of_item_R=ids,
        query_ids_B=ids[:num_rows],
        target_ids_B=ids[num_rows : 2 * num_rows],
        negative_ids_N=ids[2 * num_rows :],
        addresses=("noise",) * num_rows,
        filler={"input_ids": Tensor()},
    )


def _peak_of(run: Callable[[], object], device: str) -> int:
    if device == "cpu":
        before = reset_peak()
        run()
        return peak_bytes() - before
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - allocated


def _seconds(run: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device != "cpu" else (lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
