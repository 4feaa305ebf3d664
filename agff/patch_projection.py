"""The patch convolution as what it is: a linear layer on the pixels of a patch.

Kernel and stride of a vision tower's first layer are equal, so that patches do not overlap. As a convolution
it was measured 10 to 60 times slower than the equal matrix product on some versions of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _PatchProjection:
    """Forward of a convolution whose kernel is its stride. Parameters and their names stay as they are."""

    kernel_size: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, embedding, *grid) of pixels (N, channels, *size); what is left over at the far ends is
        dropped, as a convolution does."""
        num_dims = len(self.kernel_size)
        patches = pixels
        for dim, size in enumerate(self.kernel_size, start=2):
            patches = patches.unfold(dim, size, size)
        patches = patches.movedim(1, 1 + num_dims)  # (N, *grid, channels, *kernel)
        grid = patches.shape[: 1 + num_dims]
        rows, weight = patches.reshape(grid.numel(), -1), self.weight.flatten(1).t()
        # not functional.linear: ZeRO-3 replaces it by one that keeps the gathered weight until the backward
        # pass, which a product whose input needs no gradient does not
        projected = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        return projected.unflatten(0, grid).movedim(-1, 1)


class PatchProjection2d(_PatchProjection, nn.Conv2d):
    """Of SigLIP."""


class PatchProjection3d(_PatchProjection, nn.Conv3d):
    """Of the Qwen towers."""


KINDS: dict[type, type] = {nn.Conv2d: PatchProjection2d, nn.Conv3d: PatchProjection3d}


def project_patches_by_product(model: nn.Module) -> None:
    """Turn each convolution inside `model` whose kernel is its stride into a matrix product.

    Only the class of the module changes: its parameters, hooks and names, also those of ZeRO-3, stay.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and type(module) in KINDS and _does_not_overlap(module):
            module.__class__ = KINDS[type(module)]


def _does_not_overlap(module: nn.Conv2d | nn.Conv3d) -> bool:
    return (
        module.kernel_size == module.stride
        and (module.padding == "valid" or not any(module.padding))
        and set(module.dilation) == {1}
        and module.groups == 1
    )
