"""What the similarities of a block of rows amount to: loss and gradient, in place.

`hardest_negative_mask` followed by `ega_loss`, which say it readably and are its oracle. A further treatment
of negatives is a change here alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agff.negatives import hardest_negative_mask


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """See `agff.losses.ega_loss` and `agff.negatives.hardest_negative_mask`; raises ValueError."""

    temperature: float
    amplification: float
    width: float
    renormalize: bool
    margin: float | None
    num_hardest: int | None
    hardness_weight: float

    def __post_init__(self) -> None:
        for name in ("temperature", "width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        for name in ("amplification", "hardness_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")


class RowMeasures(NamedTuple):
    """What a row of similarities amounts to. (B,) each, without gradient."""

    loss_B: Tensor
    """InfoNCE over the negatives that act, their logits with the hardness weight."""
    positive_B: Tensor
    """Similarity of the positive."""
    hardest_B: Tensor
    """Similarity of the most similar candidate that may be a negative, whether margin and number let it act
    or not: what the model confuses. -1, the lowest there is, for a row without any."""
    num_candidates_B: Tensor
    """How many may be negatives."""
    num_negatives_B: Tensor
    """How many act: 0 where none survives, and then the loss and its gradient are 0."""
    weight_sum_B: Tensor
    """Sum of the `ega_weights` of those that act."""


def row_losses(
    similarity_bC: Tensor,
    scratch_bC: Tensor,
    positive_index_b1: Tensor,
    weight_b1: Tensor,
    negative_bC: Tensor,
    settings: RowSettings,
) -> Tensor:
    """(b, R) RowMeasures; the similarity becomes the gradient with respect to it, times the weight.

    `ega_loss` by hand, each line one pass in place. A candidate that does not act is at similarity -inf, so
    that its exponentials are 0. The positive is kept beside the matrix until its gradient, which balances the
    row. A negative's logit is s / temperature + hardness_weight * s, so a softmax at a lower temperature in
    which the positive lies lower.
    """
    amplification = settings.amplification
    positive_b1 = similarity_bC.gather(1, positive_index_b1)
    acting_bC = _acting(similarity_bC, positive_index_b1, negative_bC, settings)
    num_candidates_b1, hardest_b1 = _exclude(similarity_bC, positive_index_b1, negative_bC)
    num_negatives_b1, highest_b1 = num_candidates_b1, hardest_b1
    if acting_bC is not None:
        num_negatives_b1, highest_b1 = _exclude(similarity_bC, positive_index_b1, acting_bC)
    weight_sum_b1 = num_negatives_b1.to(similarity_bC.dtype)
    if amplification > 0:
        hardness_bC = torch.sub(similarity_bC, positive_b1, out=scratch_bC)
        hardness_bC.abs_().mul_(-1 / settings.width).exp_()
        weight_sum_b1 = weight_sum_b1 + amplification * hardness_bC.sum(dim=1, keepdim=True)
    sharpened = 1 + settings.hardness_weight * settings.temperature
    lowered_b1, temperature = positive_b1 / sharpened, settings.temperature / sharpened
    largest_b1 = torch.maximum(highest_b1, lowered_b1)
    odds_bC = similarity_bC.sub_(largest_b1).mul_(1 / temperature).exp_()
    positive_logit_b1 = (lowered_b1 - largest_b1) / temperature
    positive_odds_b1 = positive_logit_b1.exp()
    norm_b1 = odds_bC.sum(dim=1, keepdim=True) + positive_odds_b1
    loss_b1 = norm_b1.log() - positive_logit_b1
    if amplification > 0:
        odds_bC.addcmul_(odds_bC, hardness_bC, value=amplification)
    odds_sum_b1 = odds_bC.sum(dim=1, keepdim=True)
    if settings.renormalize:
        norm_b1 = odds_sum_b1 + positive_odds_b1
    scale_b1 = weight_b1 / (settings.temperature * norm_b1)
    odds_bC.mul_(scale_b1).scatter_(1, positive_index_b1, -odds_sum_b1 * scale_b1)
    measures = [
        loss_b1,
        positive_b1,
        hardest_b1.clamp(min=-1),
        num_candidates_b1,
        num_negatives_b1,
        weight_sum_b1,
    ]
    return torch.cat([measure.to(similarity_bC.dtype) for measure in measures], dim=1)


def _acting(
    similarity_bC: Tensor, positive_index_b1: Tensor, negative_bC: Tensor, settings: RowSettings
) -> Tensor | None:
    """Which of the negatives act; None: all."""
    if settings.margin is None and settings.num_hardest is None:
        return None
    return hardest_negative_mask(
        similarity_bC,
        positive_index_b1[:, 0],
        margin=settings.margin,
        num_hardest=settings.num_hardest,
        negative_mask_BC=negative_bC,
    )


def _exclude(similarity_bC: Tensor, positive_index_b1: Tensor, negative_bC: Tensor) -> tuple[Tensor, Tensor]:
    """Set everything else to -inf; (how many negatives remain, the highest of them), (b, 1) each."""
    excluded_bC = (~negative_bC).scatter_(1, positive_index_b1, True)
    similarity_bC.masked_fill_(excluded_bC, -torch.inf)
    num_negatives_b1 = excluded_bC.shape[1] - excluded_bC.sum(dim=1, keepdim=True)
    return num_negatives_b1, similarity_bC.amax(dim=1, keepdim=True)
