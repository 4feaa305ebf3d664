"""The fused similarity with its parts made to vary; the project's own wherever nothing varies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agff.batch import Batch
from agff.losses import info_nce
from agff.objectives.contrastive import Contrastive
from agff.similarity import FusionConfig, fused_similarity
from tests.benchmarks.ablation.settings import Setting


def similarity(query_BMD: Tensor, target_CMD: Tensor, setting: Setting) -> Tensor:
    """(B, C) of the setting, `agff.fused_similarity` unless it asks for another one."""
    if is_own_similarity(setting):
        return fused_similarity(query_BMD, target_CMD, beta=setting.beta)
    return varied_similarity(
        query_BMD,
        target_CMD,
        beta=setting.beta,
        outer_beta=setting.outer_beta or setting.beta,
        aligned=setting.aligned,
        global_weight=setting.global_weight,
    )


def is_own_similarity(setting: Setting) -> bool:
    """Whether the project's own similarity is what it asks for."""
    plain = Setting()
    names = ("outer_beta", "aligned", "global_weight")
    return all(getattr(setting, name) == getattr(plain, name) for name in names)


def varied_similarity(
    query_BMD: Tensor,
    target_CMD: Tensor,
    *,
    beta: float,
    outer_beta: float,
    aligned: bool,
    global_weight: float,
) -> Tensor:
    """(B, C): four patterns by log-mean-exp at beta, then their weighted log-sum-exp at outer_beta.

    aligned: fine-fine compares vector m with vector m alone. With outer_beta = beta, aligned False and
    global_weight 1/4 it is `agff.fused_similarity`."""
    pairs = torch.einsum("bmd,cnd->bcmn", query_BMD, target_CMD) / beta
    fine_fine = pairs[..., 1:, 1:].diagonal(dim1=-2, dim2=-1) if aligned else pairs[..., 1:, 1:].flatten(2)
    parts = [pairs[..., 1:, 0], pairs[..., 0, 1:], fine_fine]
    patterns = [pairs[..., 0, 0], *(part.logsumexp(-1) - math.log(part.shape[-1]) for part in parts)]
    weights = [global_weight, *[(1 - global_weight) / 3] * 3]
    logits = [
        beta * pattern / outer_beta + math.log(weight)
        for pattern, weight in zip(patterns, weights, strict=True)
    ]
    return outer_beta * torch.stack(logits).logsumexp(0)


def training_loss(caption_BMD: Tensor, image_BMD: Tensor, setting: Setting) -> Tensor:
    """Of pairs (caption i, image i), both directions: the objective `contrastive` unless the similarity or
    the negatives' weights vary."""
    loss = _loss(caption_BMD, image_BMD, setting)
    if setting.nested_global > 0:
        nested = _loss(caption_BMD[:, :1], image_BMD[:, :1], setting)
        loss = (loss + setting.nested_global * nested) / (1 + setting.nested_global)
    return loss


def _loss(caption_BMD: Tensor, image_BMD: Tensor, setting: Setting) -> Tensor:
    if is_own_similarity(setting):
        objective = Contrastive(
            temperature=setting.temperature,
            amplification=setting.amplification,
            hardness_weight=setting.hardness_weight,
            bidirectional=True,
        )
        encoded = ({"embedding": side} for side in (caption_BMD, image_BMD, caption_BMD[:0]))
        return objective(*encoded, _batch(len(caption_BMD)), FusionConfig(beta=setting.beta)).loss
    assert setting.amplification == setting.hardness_weight == 0, "the objective's"
    similarity_BB = similarity(caption_BMD, image_BMD, setting)
    positive_B = torch.arange(len(similarity_BB))
    both = [
        info_nce(direction, positive_B, temperature=setting.temperature).mean()
        for direction in (similarity_BB, similarity_BB.T)
    ]
    return (both[0] + both[1]) / 2


def _batch(num_pairs: int) -> Batch:
    """Of pairs whose contents all differ."""
    ids_B = torch.arange(num_pairs)
    return Batch(
        chunks=(),
        row_of_item_R=torch.arange(2 * num_pairs),
        query_ids_B=ids_B,
        target_ids_B=ids_B,
        negative_ids_N=ids_B[:0],
        addresses=("",) * num_pairs,
        filler={},
    )
