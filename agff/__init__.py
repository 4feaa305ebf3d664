"""Learning core of AGFF-Embed: tensors in, tensors out.

fused_similarity   four global/fine similarities joined by log-sum-exp
info_nce           cross-entropy of the positive among the candidates
ega_loss           InfoNCE with amplified gradients of hard negatives
hardest_negative_mask
                   which candidates act as negatives: false ones out, hardest in
distillation_loss  KL between the teacher's and the student's comparisons of a batch
mac_loss           InfoNCE of embeddings and of the means of their tokens
roi_align          bilinear samples of boxes on a feature map
load               a release folder -> model with .encode(items) and .similarity(a, b)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agff.losses import ega_loss, info_nce
from agff.negatives import hardest_negative_mask
from agff.objectives.distillation import distillation_loss
from agff.objectives.mac import mac_loss
from agff.regions import roi_align
from agff.similarity import fused_similarity

if TYPE_CHECKING:
    import torch

    from agff.embedder import Embedder

__all__ = [
    "distillation_loss",
    "ega_loss",
    "fused_similarity",
    "hardest_negative_mask",
    "info_nce",
    "load",
    "mac_loss",
    "roi_align",
]


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    check: bool = True,
    backbone: str | Path | None = None,
) -> Embedder:
    """See `agff.release.load`; imported on first use, because it needs transformers."""
    from agff.release import load as load_release

    return load_release(folder, device=device, check=check, backbone=backbone)
