from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from agff.backbone import load_backbone
from agff.patch_projection import PatchProjection2d, PatchProjection3d, project_patches_by_product
from tests.agff.family_folders import BUILDERS


@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (nn.Conv2d(3, 5, kernel_size=4, stride=4, padding="valid"), (8, 12)),
        (nn.Conv2d(3, 5, kernel_size=4, stride=4), (11, 15)),  # SigLIP's 384 pixels are 27.4 patches of 14
        (nn.Conv3d(3, 5, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=False), (2, 4, 4)),
        (nn.Conv3d(3, 5, kernel_size=(2, 4, 4), stride=(2, 4, 4)), (4, 8, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_and_gradients_equal_those_of_the_convolution(
    convolution: nn.Module, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Up to the order of sums of 48 or 96 products; bfloat16 rounds the result only."""
    torch.manual_seed(0)
    convolution.to(dtype).zero_grad()
    pixels = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    expected = convolution(pixels)
    weights = torch.randn(expected.shape, dtype=dtype)
    inputs = [pixels, *convolution.parameters()]
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    kind = type(convolution)
    project_patches_by_product(nn.Sequential(convolution))
    found = convolution(pixels)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    convolution.__class__ = kind  # the next case has the same module
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(3, 5, kernel_size=4, stride=2),
        nn.Conv2d(3, 5, kernel_size=4, stride=4, padding=1),
        nn.Conv2d(4, 4, kernel_size=2, stride=2, groups=2),
        nn.Conv2d(3, 5, kernel_size=4, stride=4, dilation=2),
        nn.Conv1d(3, 5, kernel_size=4, stride=4),
    ],
)
def test_other_convolutions_stay(other: nn.Module) -> None:
    kind = type(other)
    project_patches_by_product(other)
    assert type(other) is kind


def test_the_weight_of_a_frozen_input_is_not_kept_for_the_backward_pass() -> None:
    """Under ZeRO-3 it would be a whole gathered weight, with whatever was gathered in one buffer with it."""
    layer = nn.Conv2d(3, 5, kernel_size=4, stride=4)
    project_patches_by_product(layer)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        layer(torch.randn(2, 3, 8, 8))
    weight = layer.weight.untyped_storage().data_ptr()
    assert kept
    assert all(tensor.untyped_storage().data_ptr() != weight for tensor in kept)


@pytest.mark.parametrize("family", BUILDERS)
def test_every_backbone_projects_its_patches_by_a_product_under_the_published_name(
    family: str, tmp_path: Path
) -> None:
    from transformers import AutoModel

    BUILDERS[family](tmp_path)
    model = load_backbone(tmp_path, dtype=torch.float32, attention="sdpa")
    kinds = {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d)
    }
    assert list(kinds.values()) == [PatchProjection2d if family == "llava_onevision" else PatchProjection3d]
    untouched = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
