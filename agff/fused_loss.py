"""The loss of a rank's rows against all candidates, with its gradients, block of rows by block of rows.

The same mathematics as `fused_similarity` followed by `ega_loss`, which say it readably and are its oracle.
Here nothing of (B, C) is kept or computed twice: the gradient of a row with respect to its similarities is
known as soon as the row has met all candidates, so one pass over blocks of rows yields the loss and the
gradients of both sides of vectors. What is left beside the matrix products is five passes over a block's
pairs of vectors (product, exponential, sum, scaling, product) and about fifteen over its similarities, all in
one buffer, which every block uses again.

What a row's similarities amount to, treatments of negatives included, is `agff/row_loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agff.row_loss import RowMeasures, RowSettings, row_losses
from agff.similarity import same_float_dtype, side_weights, side_weights_like

BLOCK_ELEMENTS = 14 * 2**20
"""Numbers in a block (56 MiB in float32), hence its rows: 64 with 8,192 candidates and K = 4. Each block adds
to the gradient of every candidate, which costs more than the product itself where a block has few rows."""

STATISTICS = 3
"""(b, C) matrices of a block beside its M x M pairs of vectors."""

LARGEST_EXPONENT = 60
"""Products of unit vectors over a beta of 1/60 or more need no maximum taken off before the exponential.
float32 would hold exp(80), but not a small gradient divided by it: exp(60) leaves room down to 1e-12."""


@dataclass(frozen=True)
class _Settings:
    beta: float
    rows: RowSettings
    negatives_of: Callable[[slice], Tensor]


def fused_loss(
    query_BMD: Tensor,
    candidate_CMD: Tensor,
    positive_index_B: Tensor,
    weight_B: Tensor,
    *,
    negatives_of: Callable[[slice], Tensor],
    beta: float,
    temperature: float,
    amplification: float,
    width: float,
    renormalize: bool,
    margin: float | None = None,
    num_hardest: int | None = None,
    hardness_weight: float = 0.0,
) -> tuple[Tensor, RowMeasures]:
    """(sum of weight_B * loss_B, measures of the rows) of `ega_loss` on the `fused_similarity`.

    Unit vectors of any float dtype in; float32 or better inside and out. The gradients of both sides are
    computed here and held until the backward, which scales them in place: differentiable once, backward once.
    Memory beyond them: one block of BLOCK_ELEMENTS, or one row where that is more; `num_hardest` needs two
    (b, C) matrices of that block's rows beside it.

    positive_index_B: of each row's positive among the C candidates. weight_B: without gradient.
    negatives_of: slice of b rows -> (b, C) mask, True = may act as a negative; the positive never does.
    beta: softness of the fusion, see `fused_similarity`. margin, num_hardest: see `hardest_negative_mask`, in
    units of the fused similarity; both None: every candidate that may act does. The others: see `ega_loss`.
    """
    query_BMD, candidate_CMD = same_float_dtype(query_BMD, candidate_CMD)
    if beta <= 0:
        raise ValueError(f"beta={beta} must be > 0")
    rows = RowSettings(
        temperature=temperature,
        amplification=amplification,
        width=width,
        renormalize=renormalize,
        margin=margin,
        num_hardest=num_hardest,
        hardness_weight=hardness_weight,
    )
    settings = _Settings(beta, rows, negatives_of)
    with torch.autocast(query_BMD.device.type, enabled=False):
        loss, *measures = _FusedLoss.apply(
            query_BMD.contiguous(), candidate_CMD.contiguous(), positive_index_B, weight_B, settings
        )
    return loss, RowMeasures(*measures)


def block_elements(num_rows: int, num_candidates: int, num_vectors: int) -> int:
    """How many numbers the one buffer of `fused_loss` holds."""
    rows = _rows_of_block(num_rows, num_candidates, num_vectors)
    return rows * num_candidates * (num_vectors**2 + STATISTICS)


def _rows_of_block(num_rows: int, num_candidates: int, num_vectors: int) -> int:
    """As few blocks as BLOCK_ELEMENTS allows, of equal size but the last."""
    elements = num_rows * num_candidates * (num_vectors**2 + STATISTICS)
    num_blocks = min(num_rows, -(-elements // BLOCK_ELEMENTS))
    return -(-num_rows // max(1, num_blocks))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BMD: Tensor,
        candidate_CMD: Tensor,
        positive_index_B: Tensor,
        weight_B: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        (num_rows, num_vectors, _), num_candidates = query_BMD.shape, candidate_CMD.shape[0]
        size = _rows_of_block(num_rows, num_candidates, num_vectors)
        buffer = query_BMD.new_empty(block_elements(num_rows, num_candidates, num_vectors))
        grad_query_BMD, grad_candidate_CMD = torch.zeros_like(query_BMD), torch.zeros_like(candidate_CMD)
        measures_BR = query_BMD.new_empty(num_rows, len(RowMeasures._fields))
        weight_B = weight_B.to(query_BMD.dtype)
        for start in range(0, num_rows, size):
            rows = slice(start, min(start + size, num_rows))
            block = _Block.of(buffer, rows.stop - start, num_candidates, num_vectors)
            _fuse(block, query_BMD[rows], candidate_CMD, beta=settings.beta)
            measures_BR[rows] = row_losses(
                block.similarity_bC,
                block.scratch_bC,
                positive_index_B[rows, None],
                weight_B[rows, None],
                settings.negatives_of(rows),
                settings.rows,
            )
            _add_gradients(block, query_BMD[rows], candidate_CMD, grad_query_BMD[rows], grad_candidate_CMD)
        measures = measures_BR.unbind(dim=1)
        ctx.save_for_backward(grad_query_BMD, grad_candidate_CMD)
        ctx.mark_non_differentiable(*measures)
        return (weight_B * measures_BR[:, 0]).sum(), *measures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_query_BMD, grad_candidate_CMD = ctx.saved_tensors
        # in place: a second copy of the candidates' gradient would be the peak of the whole loss
        return grad_query_BMD.mul_(grad), grad_candidate_CMD.mul_(grad), None, None, None


@dataclass(frozen=True)
class _Block:
    """Views into the buffer, for b rows."""

    pairs_MbMC: Tensor
    """[n, i, m, j]: row i's vector m with candidate j's vector n, so that all sums run along candidates and
    each [n] is a matrix of its own: products read candidate_CMD[:, n] where it lies, without a copy."""
    total_bC: Tensor
    """Weighted sum of exponentials."""
    similarity_bC: Tensor
    scratch_bC: Tensor

    @classmethod
    def of(cls, buffer: Tensor, num_rows: int, num_candidates: int, num_vectors: int) -> _Block:
        counts = [num_vectors**2, *[1] * STATISTICS]
        size = num_rows * num_candidates
        pairs, *statistics = buffer[: size * sum(counts)].split([size * count for count in counts])
        total_bC, similarity_bC, scratch_bC = (part.view(num_rows, num_candidates) for part in statistics)
        if num_vectors == 1:  # the product is the similarity
            pairs = similarity_bC
        pairs_MbMC = pairs.view(num_vectors, num_rows, num_vectors, num_candidates)
        return cls(pairs_MbMC, total_bC, similarity_bC, scratch_bC)


def _fuse(block: _Block, query_bMD: Tensor, candidate_CMD: Tensor, *, beta: float) -> None:
    """Fill the block: similarity, and what its gradient needs (the exponentials and their weighted sum)."""
    num_vectors = query_bMD.shape[1]
    if num_vectors == 1:
        torch.mm(query_bMD[:, 0], candidate_CMD[:, 0].T, out=block.similarity_bC)
        return
    scaled = query_bMD.flatten(0, 1) / beta
    needs_maximum = 1 / beta > LARGEST_EXPONENT
    block.total_bC.zero_()
    for n, pairs_bMC in enumerate(block.pairs_MbMC):
        torch.mm(scaled, candidate_CMD[:, n].T, out=pairs_bMC.flatten(0, 1))
        if not needs_maximum:  # while the product is in the cache
            _add_exponentials(block, n)
    if needs_maximum:
        maximum_bC = block.pairs_MbMC.amax(dim=(0, 2))
        block.pairs_MbMC.sub_(maximum_bC[:, None])
        for n in range(num_vectors):
            _add_exponentials(block, n)
    torch.log(block.total_bC, out=block.similarity_bC)
    if needs_maximum:
        block.similarity_bC.add_(maximum_bC)
    block.similarity_bC.mul_(beta)


def _add_exponentials(block: _Block, n: int) -> None:
    """exp of the pairs with the candidates' vectors n, and their part of the weighted sum."""
    exponentials_bMC = block.pairs_MbMC[n].exp_()
    side = side_weights(exponentials_bMC.shape[1])
    fine_bC = torch.sum(exponentials_bMC[:, 1:], dim=1, out=block.scratch_bC)
    block.total_bC.add_(fine_bC, alpha=side[1] * side[n])
    block.total_bC.add_(exponentials_bMC[:, 0], alpha=side[0] * side[n])


def _add_gradients(
    block: _Block,
    query_bMD: Tensor,
    candidate_CMD: Tensor,
    grad_query_bMD: Tensor,
    grad_candidate_CMD: Tensor,
) -> None:
    """From the gradient of the similarities to those of the vectors; the exponentials become shares.

    The weights of the vectors ride on factors that the products have anyway.
    """
    num_vectors = query_bMD.shape[1]
    side, side_M1 = side_weights(num_vectors), side_weights_like(query_bMD, num_vectors)[:, None]
    weighted, grad_query = (query_bMD * side_M1).flatten(0, 1), grad_query_bMD.flatten(0, 1)
    if num_vectors > 1:
        block.similarity_bC.div_(block.total_bC)
    for n, pairs_bMC in enumerate(block.pairs_MbMC):
        if num_vectors > 1:
            pairs_bMC.mul_(block.similarity_bC[:, None])
        pairs = pairs_bMC.flatten(0, 1)
        grad_query.addmm_(pairs, candidate_CMD[:, n], alpha=side[n])
        grad_candidate_CMD[:, n].addmm_(pairs.T, weighted, alpha=side[n])
    grad_query_bMD.mul_(side_M1)
