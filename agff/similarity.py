"""The fused similarity of AGFF-Embed: four global/fine patterns joined by log-sum-exp, block by block.

The four patterns and their fusion (README, Method 1, our definition: the paper's equations could not be
obtained) are one weighted log-sum-exp over all M x M pairs of vectors, because a log-mean-exp is a
log-sum-exp with constant weights:

    S = beta * log sum_{m,n} w_mn exp(q_m . t_n / beta),   w_gg = 1/4, w_fg = w_gf = 1/(4 K), w_ff = 1/(4 K^2)

So the gradient is a softmax over M x M pairs. This is the readable definition, and what search uses; training
runs `agff.fused_loss`, the same mathematics together with the loss and all gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    Any float dtype in; float32 or better inside and out. Between the mean and the maximum of the four
    patterns, so within [-1, 1]; without fine vectors (M = 1) it is the plain dot product, exactly.
    Memory beyond the result without gradient: a few times BLOCK_ELEMENTS, whatever C; with gradient autograd
    keeps all pairs of vectors.

    beta: softness of the fusion in units of cosine, > 0; towards 0 the fusion becomes a maximum.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta} must be > 0")
    query_BMD, target_CMD = same_float_dtype(query_BMD, target_CMD)
    with torch.autocast(query_BMD.device.type, enabled=False):
        if query_BMD.shape[1] == 1:
            return query_BMD[:, 0] @ target_CMD[:, 0].T
        fused_BC = query_BMD.new_empty(query_BMD.shape[0], target_CMD.shape[0])
        for block in _blocks(query_BMD, target_CMD):
            pairs_BMCM = _scaled_pairs(query_BMD, target_CMD[block], beta)
            fused_BC[:, block] = beta * pairs_BMCM.logsumexp(dim=(1, 3))
        return fused_BC


def fused_similarity_to_own(query_BMD: Tensor, own_BCMD: Tensor, *, beta: float) -> Tensor:
    """(B, C) fused similarity of each query to candidates of its own, from one batched product; otherwise as
    `fused_similarity`."""
    if beta <= 0:
        raise ValueError(f"beta={beta} must be > 0")
    if own_BCMD.ndim != 4 or query_BMD.shape != own_BCMD[:, 0].shape:
        raise ValueError(
            f"expected (B, M, D) and (B, C, M, D), got {tuple(query_BMD.shape)} and {tuple(own_BCMD.shape)}"
        )
    batch, num_own, num_vectors, _ = own_BCMD.shape
    dtype = torch.promote_types(torch.promote_types(query_BMD.dtype, own_BCMD.dtype), torch.float32)
    with torch.autocast(query_BMD.device.type, enabled=False):
        pairs = torch.bmm(query_BMD.to(dtype), own_BCMD.to(dtype).flatten(1, 2).transpose(1, 2))
        pairs_BMCM = pairs.view(batch, num_vectors, num_own, num_vectors)
        if num_vectors == 1:
            return pairs_BMCM[:, 0, :, 0]
        pairs_BMCM = _weighted(pairs_BMCM, beta)
        return beta * pairs_BMCM.logsumexp(dim=(1, 3))


def same_float_dtype(query_BMD: Tensor, target_CMD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, float32 at least; ValueError where their shapes do not fit."""
    if query_BMD.ndim != 3 or target_CMD.ndim != 3 or query_BMD.shape[1:] != target_CMD.shape[1:]:
        raise ValueError(
            f"expected (B, M, D) and (C, M, D), got {tuple(query_BMD.shape)} and {tuple(target_CMD.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(query_BMD.dtype, target_CMD.dtype), torch.float32)
    return query_BMD.to(dtype), target_CMD.to(dtype)


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


def side_weights(num_vectors: int) -> list[float]:
    """w_m of an item's vectors, w_mn = w_m w_n: half on the global one, half on the fine ones together."""
    num_fine = num_vectors - 1
    return [0.5, *[0.5 / num_fine] * num_fine] if num_fine else [1.0]


def side_weights_like(like: Tensor, num_vectors: int) -> Tensor:
    """(M,) `side_weights` as a tensor, filled on the device: a list copied to it would synchronise."""
    side = side_weights(num_vectors)
    side_M = like.new_full((num_vectors,), side[-1])
    side_M[0] = side[0]
    return side_M


def _log_weights(num_vectors: int, *, like: Tensor) -> Tensor:
    """(M, M) log of the weights w_mn above, which sum to 1."""
    side_M = side_weights_like(like, num_vectors)
    return (side_M[:, None] * side_M[None, :]).log()


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
    return _weighted(pairs, beta)


def _weighted(pairs_BMCM: Tensor, beta: float) -> Tensor:
    """pairs / beta + log w_mn, in the memory of the pairs."""
    log_weights_MM = _log_weights(pairs_BMCM.shape[1], like=pairs_BMCM)
    return pairs_BMCM.div_(beta).add_(log_weights_MM[:, None, :])
