"""Collectives of the learning core: every rank must call each of them, in the same order.

All of them are the identity in a world of one, also without a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agff.errors import AgffError


def world_size() -> int:
    """Number of ranks; 1 without a process group. Not a collective."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group. Not a collective."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) on each rank -> (W * B, ...) in rank order on every rank. B must be equal on all ranks.

    The gradient is summed over ranks and handed back to the rank that owns the row. With a mean loss over
    local rows and ZeRO's mean over ranks this is the exact gradient of the global mean, without any
    world-size factor.
    """
    if world_size() == 1:
        return rows
    return _AllGatherRows.apply(rows)


def max_over_ranks(values: Sequence[int], *, device: torch.device) -> list[int]:
    """The largest of each value over all ranks."""
    if world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Each rank's small picklable value, in rank order, on every rank. Only between ranks of one run."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: AgffError | None) -> None:
    """Raise on every rank the error that the first of them has; return when none has one."""
    found = next((other for other in gather_objects(error) if other is not None), None)
    if found is not None:
        raise found.shared()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over ranks, the same bits on each of them, so that they may decide by it; used for metrics."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    dist.broadcast(values, src=0)
    return values / world_size()


def weighted_mean_over_all_rows(value_B: Tensor, weight_B: Tensor) -> Tensor:
    """This rank's share of sum(weight * value) / sum(weight) over the rows of all ranks: the ranks' mean is
    that mean, and 0 where all weights are 0.

    The only place with a world size in it: ZeRO averages gradients over ranks, and here a rank may have more
    eligible rows than another, or none. Values of weight 0 do not count, whatever they are. The gradient goes
    to the values alone.
    """
    value_B = value_B.to(torch.promote_types(value_B.dtype, torch.float32))
    weight_B = weight_B.detach().to(value_B.dtype)
    total = weight_B.sum()
    if world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    counted_B = value_B.masked_fill(weight_B == 0, 0)
    return world_size() * (weight_B * counted_B).sum() / total.masked_fill(total == 0, 1)


# torch 2.13 renamed them and warns at every call of the old names
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_sum_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        _gather_into(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        _scatter_sum_into(own, grad.contiguous(), op=dist.ReduceOp.SUM)
        return own
