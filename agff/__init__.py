"""Learning core of AGFF-Embed: tensors in, tensors out.

fused_similarity   four global/fine similarities joined by log-sum-exp
ega_loss           InfoNCE with amplified gradients of hard negatives
load               a release folder -> model with .encode(items) and .similarity(a, b)
"""

from typing import Any

from agff.losses import ega_loss
from agff.similarity import fused_similarity

__all__ = ["ega_loss", "fused_similarity", "load"]


def load(folder: Any, **options: Any) -> Any:
    """See `agff.release.load`; imported on first use, because it needs transformers."""
    from agff.release import load as load_release

    return load_release(folder, **options)
