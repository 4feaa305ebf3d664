"""The fused similarity of AGFF-Embed: four global/fine patterns joined by log-sum-exp, block by block.

The four patterns and their fusion (README, Method 1, our definition: the paper's equations could not be
obtained) are one weighted log-sum-exp over all M x M pairs of vectors, because a log-mean-exp is a
log-sum-exp with constant weights:

    S = beta * log sum_{m,n} w_mn exp(q_m . t_n / beta),   w_gg = 1/4, w_fg = w_gf = 1/(4 K), w_ff = 1/(4 K^2)

So the gradient is a softmax over M x M pairs, and both passes work on one block of candidates at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agff.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How the four patterns of two items become one similarity; part of the model, stored in a release."""

    beta: float = 0.05
    """Softness of the fusion, in units of cosine; 0.01 to 0.2. Towards 0 it becomes a maximum."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"fusion.beta={self.beta} must be > 0")


BLOCK_ELEMENTS = 2**22
"""Pairs of vectors compared at once (16 MB in float32): enough for full matmul speed, little memory."""

PATTERNS = ("global_global", "fine_global", "global_fine", "fine_fine")


def fused_similarity(query_BMD: Tensor, target_CMD: Tensor, *, beta: float) -> Tensor:
    """(B, C) fused similarity of unit vectors; vector 0 of an item is global, the others are fine-grained.

    Any float dtype in; float32 or better inside and out. Differentiable once in both arguments. Between the
    mean and the maximum of the four patterns, so within [-1, 1]; without fine vectors (M = 1) it is the plain
    dot product, exactly. Memory beyond the result and the gradients: a few times BLOCK_ELEMENTS, whatever C.

    beta: softness of the fusion in units of cosine, > 0; towards 0 the fusion becomes a maximum.
    """
    if query_BMD.ndim != 3 or target_CMD.ndim != 3 or query_BMD.shape[1:] != target_CMD.shape[1:]:
        raise ValueError(
            f"expected (B, M, D) and (C, M, D), got {tuple(query_BMD.shape)} and {tuple(target_CMD.shape)}"
        )
    if beta <= 0:
        raise ValueError(f"beta={beta} must be > 0")
    dtype = torch.promote_types(torch.promote_types(query_BMD.dtype, target_CMD.dtype), torch.float32)
    query_BMD, target_CMD = query_BMD.to(dtype), target_CMD.to(dtype)
    with torch.autocast(query_BMD.device.type, enabled=False):
        if query_BMD.shape[1] == 1:
            return query_BMD[:, 0] @ target_CMD[:, 0].T
        return _FusedSimilarity.apply(query_BMD, target_CMD, beta)


def pattern_shares(query_BMD: Tensor, target_BMD: Tensor, *, beta: float) -> Tensor:
    """(4,) mean share of each of PATTERNS in the fused score of the pairs (query i, target i); sums to 1.

    The share is dS/ds_p, the adaptive weight of README, Method 1. No gradient.
    """
    with torch.no_grad():
        dtype = torch.promote_types(query_BMD.dtype, torch.float32)
        pairs_BMM = torch.einsum("bmd,bnd->bmn", query_BMD.to(dtype), target_BMD.to(dtype)) / beta
        pairs_BMM = pairs_BMM + _log_weights(query_BMD.shape[1], like=pairs_BMM)
        share_MM = pairs_BMM.flatten(1).softmax(dim=1).view_as(pairs_BMM).mean(dim=0)
        return torch.stack(
            [share_MM[0, 0], share_MM[1:, 0].sum(), share_MM[0, 1:].sum(), share_MM[1:, 1:].sum()],
        )


def _log_weights(num_vectors: int, *, like: Tensor) -> Tensor:
    """(M, M) log of the weights w_mn above; the weights sum to 1 (or to w_gg = 1 without fine vectors)."""
    if num_vectors == 1:
        return like.new_zeros(1, 1)
    side = like.new_full((num_vectors,), 0.5 / (num_vectors - 1))
    side[0] = 0.5
    return (side[:, None] * side[None, :]).log()


class _FusedSimilarity(torch.autograd.Function):
    """Forward and backward over blocks of candidates; between them only inputs and result are kept."""

    @staticmethod
    def forward(ctx: Any, query_BMD: Tensor, target_CMD: Tensor, beta: float) -> Tensor:
        fused_BC = query_BMD.new_empty(query_BMD.shape[0], target_CMD.shape[0])
        for block in _blocks(query_BMD, target_CMD):
            fused_BC[:, block] = beta * _scaled_pairs(query_BMD, target_CMD[block], beta).logsumexp(
                dim=(1, 3)
            )
        ctx.save_for_backward(query_BMD, target_CMD, fused_BC)
        ctx.beta = beta
        return fused_BC

    @staticmethod
    def backward(ctx: Any, grad_BC: Tensor) -> tuple[Tensor, Tensor, None]:
        query_BMD, target_CMD, fused_BC = ctx.saved_tensors
        grad_query_BMD, grad_target_CMD = torch.zeros_like(query_BMD), torch.empty_like(target_CMD)
        for block in _blocks(query_BMD, target_CMD):
            share_BMCM = _scaled_pairs(query_BMD, target_CMD[block], ctx.beta)
            share_BMCM.sub_(fused_BC[:, None, block, None] / ctx.beta).exp_().mul_(
                grad_BC[:, None, block, None]
            )
            share = share_BMCM.reshape(query_BMD.shape[0] * query_BMD.shape[1], -1)
            grad_query_BMD.view(-1, query_BMD.shape[2]).addmm_(share, target_CMD[block].flatten(0, 1))
            grad_target_CMD[block] = (share.T @ query_BMD.flatten(0, 1)).view_as(target_CMD[block])
        return grad_query_BMD, grad_target_CMD, None


def _blocks(query_BMD: Tensor, target_CMD: Tensor) -> list[slice]:
    """Slices of the candidates, each with at most BLOCK_ELEMENTS pairs of vectors against all queries."""
    pairs_per_candidate = query_BMD.shape[0] * query_BMD.shape[1] * target_CMD.shape[1]
    size = max(1, BLOCK_ELEMENTS // max(1, pairs_per_candidate))
    return [slice(start, start + size) for start in range(0, target_CMD.shape[0], size)]


def _scaled_pairs(query_BMD: Tensor, target_CMD: Tensor, beta: float) -> Tensor:
    """(B, M, C, M) q_m . t_n / beta + log w_mn."""
    num_queries, num_vectors, _ = query_BMD.shape
    pairs = (query_BMD.flatten(0, 1) @ target_CMD.flatten(0, 1).T).view(
        num_queries, num_vectors, -1, num_vectors
    )
    return pairs.div_(beta).add_(_log_weights(num_vectors, like=pairs)[:, None, :])
