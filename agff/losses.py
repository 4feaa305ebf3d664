"""Contrastive losses over a (B, C) similarity: InfoNCE, and EGA, which amplifies hard negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    similarity_BC: Tensor,
    positive_index_B: Tensor,
    *,
    temperature: float,
    negative_mask_BC: Tensor | None = None,
    hardness_weight: float = 0.0,
) -> Tensor:
    """(B,) cross-entropy of the positive among the candidates.

    positive_index_B: of each row's positive among the C candidates. negative_mask_BC: True = may act as a
    negative, see `hardest_negative_mask`; the positive is never masked. float32 or better inside.
    hardness_weight: what a negative's logit gets more for each unit of its similarity, without gradient, so
        that it counts exp(weight * similarity) times: LLaVE's weighting (arXiv 2503.04812), 9 there. >= 0.
    """
    logits_BC = _masked_logits(
        similarity_BC,
        positive_index_B,
        temperature=temperature,
        negative_mask_BC=negative_mask_BC,
        hardness_weight=hardness_weight,
    )
    return F.cross_entropy(logits_BC, positive_index_B, reduction="none")


def ega_loss(
    similarity_BC: Tensor,
    positive_index_B: Tensor,
    *,
    temperature: float,
    amplification: float,
    width: float = 0.1,
    renormalize: bool = True,
    negative_mask_BC: Tensor | None = None,
    hardness_weight: float = 0.0,
) -> Tensor:
    """(B,) InfoNCE whose gradient is amplified at hard negatives: Explicit Gradient Amplifier
    (arXiv 2506.02020).

    The value is the InfoNCE loss. Its gradient with respect to the similarity is (P_bar - I) / temperature,
    where P_bar re-weights the softmax P by `ega_weights` (README, Method 2: the weights are our
    definition). Amplification 0 is InfoNCE bit for bit. Differentiable once; no gradient flows through the
    weights.

    amplification: >= 0; the hardest negative weighs 1 + amplification.
    width: distance to the positive, in units of cosine, at which the extra weight has fallen to 1/e; > 0.
    renormalize: True: rows of P_bar are probabilities again. False: the gradient of each negative is
        multiplied by exactly its weight, and the positive balances the row.
    negative_mask_BC, hardness_weight: see `info_nce`; P is then the softmax of those logits.
    """
    if amplification < 0:
        raise ValueError(f"amplification={amplification} must be >= 0")
    loss_B = info_nce(
        similarity_BC,
        positive_index_B,
        temperature=temperature,
        negative_mask_BC=negative_mask_BC,
        hardness_weight=hardness_weight,
    )
    if amplification > 0:
        with torch.no_grad():
            logits_BC = _masked_logits(
                similarity_BC,
                positive_index_B,
                temperature=temperature,
                negative_mask_BC=negative_mask_BC,
                hardness_weight=hardness_weight,
            )
            weight_BC = ega_weights(similarity_BC, positive_index_B, amplification=amplification, width=width)
            amplified_BC = logits_BC.softmax(dim=1) * weight_BC
            if renormalize:
                amplified_BC /= amplified_BC.sum(dim=1, keepdim=True)
            gradient_BC = amplified_BC.scatter(1, positive_index_B[:, None], 0.0)
            gradient_BC.scatter_(1, positive_index_B[:, None], -gradient_BC.sum(dim=1, keepdim=True))
            gradient_BC /= temperature
        # zero in value: x - x, with the wanted gradient in x alone
        carrier_B = (gradient_BC * similarity_BC.to(gradient_BC.dtype)).sum(dim=1)
        loss_B = loss_B.detach() + (carrier_B - carrier_B.detach())
    return loss_B


def ega_weights(
    similarity_BC: Tensor, positive_index_B: Tensor, *, amplification: float, width: float
) -> Tensor:
    """(B, C) weights 1 + amplification * exp(-|s_ij - s_ii| / width); 1 at the positive. No gradient (ours).

    Hard is what comes close to the positive's own similarity, not what is similar in itself
    (relative-similarity hardness).
    """
    if width <= 0:
        raise ValueError(f"width={width} must be > 0")
    with torch.no_grad():
        similarity_BC = similarity_BC.to(torch.promote_types(similarity_BC.dtype, torch.float32))
        relative_BC = similarity_BC - similarity_BC.gather(1, positive_index_B[:, None])
        weight_BC = 1 + amplification * torch.exp(-relative_BC.abs() / width)
        return weight_BC.scatter(1, positive_index_B[:, None], 1.0)


def _masked_logits(
    similarity_BC: Tensor,
    positive_index_B: Tensor,
    *,
    temperature: float,
    negative_mask_BC: Tensor | None,
    hardness_weight: float,
) -> Tensor:
    """(B, C) similarity / temperature, and what is added to a negative's; -inf at candidates that are no
    negatives, never at the positive."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if hardness_weight < 0:
        raise ValueError(f"hardness_weight={hardness_weight} must be >= 0")
    if similarity_BC.ndim != 2 or positive_index_B.shape != similarity_BC.shape[:1]:
        raise ValueError(
            f"expected (B, C) and (B,), got {tuple(similarity_BC.shape)} and {tuple(positive_index_B.shape)}"
        )
    similarity_BC = similarity_BC.to(torch.promote_types(similarity_BC.dtype, torch.float32))
    logits_BC = similarity_BC / temperature
    if hardness_weight > 0:
        added_BC = hardness_weight * similarity_BC.detach()
        logits_BC = logits_BC + added_BC.scatter(1, positive_index_B[:, None], 0.0)
    if negative_mask_BC is None:
        return logits_BC
    if negative_mask_BC.shape != similarity_BC.shape:
        raise ValueError(f"mask {tuple(negative_mask_BC.shape)} does not fit {tuple(similarity_BC.shape)}")
    return logits_BC.masked_fill(~negative_mask_BC.scatter(1, positive_index_B[:, None], True), -torch.inf)
