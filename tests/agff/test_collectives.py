from __future__ import annotations

from typing import Any

import torch

from agff.collectives import all_gather_rows, gather_objects, mean_over_ranks
from tests.ranks import run_ranks


def worker() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    rows = torch.full((2, 3), float(rank + 1), dtype=torch.float64, requires_grad=True)
    gathered = all_gather_rows(rows)
    weight = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered) * (rank + 1)
    (gathered * weight).sum().backward()
    return {
        "gathered": gathered.detach(),
        "gradient": rows.grad,
        "objects": gather_objects(f"rank {rank}"),
        "mean": mean_over_ranks(torch.tensor([float(rank)])),
    }


def test_gather_is_in_rank_order_and_its_gradient_is_summed_over_ranks() -> None:
    results = run_ranks(worker, world_size=2)
    weight = torch.arange(12, dtype=torch.float64).view(4, 3) * 3  # rank weights 1 + 2
    for rank, result in enumerate(results):
        assert result["gathered"].tolist() == [[1.0] * 3, [1.0] * 3, [2.0] * 3, [2.0] * 3]
        torch.testing.assert_close(result["gradient"], weight[2 * rank : 2 * rank + 2])
        assert result["objects"] == ["rank 0", "rank 1"]
        assert result["mean"].item() == 0.5


def test_one_process_needs_no_group() -> None:
    rows = torch.randn(2, 3)
    assert all_gather_rows(rows) is rows
    assert gather_objects("me") == ["me"]
    assert mean_over_ranks(rows) is rows
