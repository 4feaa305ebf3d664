"""Means over cells and bilinear samples of boxes, against loops written from their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import agff
from agff.regions import ImageCells, box_problem, mean_cells, roi_align

BOXES = torch.tensor(
    [
        [0.0, 0.0, 7.0, 5.0],  # the whole map
        [1.3, 0.2, 4.9, 3.7],
        [2.0, 1.0, 2.4, 1.3],  # inside of one cell
        [-3.0, -2.5, 1.0, 2.0],  # samples that count 0, and samples beyond the centres
        [5.5, 3.5, 9.5, 8.0],
    ],
    dtype=torch.float64,
)


def a_map(height: int = 5, width: int = 7, dim: int = 3) -> Tensor:
    return torch.randn(height, width, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def slow_roi_align(features: Tensor, box: list[float], size: int, samples: int) -> Tensor:
    """torchvision's formula for aligned=True, point by point."""
    height, width, dim = features.shape
    x0, y0, x1, y1 = (value - 0.5 for value in box)
    found = torch.zeros(size, size, dim, dtype=torch.float64)
    for row in range(size):
        for column in range(size):
            for i in range(samples):
                for j in range(samples):
                    y = y0 + row * (y1 - y0) / size + (i + 0.5) * (y1 - y0) / size / samples
                    x = x0 + column * (x1 - x0) / size + (j + 0.5) * (x1 - x0) / size / samples
                    if y < -1 or y > height or x < -1 or x > width:
                        continue
                    y, x = max(y, 0.0), max(x, 0.0)
                    low_y, low_x = int(y), int(x)
                    high_y, high_x = low_y + 1, low_x + 1
                    if low_y >= height - 1:
                        high_y = low_y = height - 1
                        y = float(low_y)
                    if low_x >= width - 1:
                        high_x = low_x = width - 1
                        x = float(low_x)
                    ly, lx = y - low_y, x - low_x
                    found[row, column] += (
                        (1 - ly) * (1 - lx) * features[low_y, low_x]
                        + (1 - ly) * lx * features[low_y, high_x]
                        + ly * (1 - lx) * features[high_y, low_x]
                        + ly * lx * features[high_y, high_x]
                    ) / samples**2
    return found


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3])
def test_roi_align_equals_torchvisions_formula_point_by_point(size: int, samples: int) -> None:
    found = agff.roi_align(a_map(), BOXES, output_size=size, samples=samples)
    assert found.shape == (len(BOXES), size, size, 3)
    for box, region in zip(BOXES.tolist(), found, strict=True):
        expected = slow_roi_align(a_map(), box, size, samples)
        torch.testing.assert_close(region, expected, rtol=1e-12, atol=1e-12)


def test_a_constant_map_gives_the_constant() -> None:
    inside = BOXES[:3]
    found = roi_align(torch.full((5, 7, 2), 3.25), inside, output_size=3)
    torch.testing.assert_close(found, torch.full((3, 3, 3, 2), 3.25))


@pytest.mark.parametrize(("side", "samples"), [(1, 12), (1, 24), (1, 6), (2, 6), (3, 4), (6, 2), (12, 1)])
def test_the_whole_map_is_the_adaptive_mean_where_the_side_divides_it(side: int, samples: int) -> None:
    """With a point at each centre, with a multiple of that, and with half of it."""
    features = a_map(12, 12)
    found = roi_align(features, torch.tensor([[0.0, 0, 12, 12]]).double(), output_size=side, samples=samples)
    torch.testing.assert_close(found[0], mean_cells(features, side, side), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (5, 3), (1, 6), (2, 2), (9, 10)])
def test_mean_cells_are_torchs_adaptive_pooling(height: int, width: int) -> None:
    features = a_map(9, 10)
    expected = functional.adaptive_avg_pool2d(features.permute(2, 0, 1), (height, width)).permute(1, 2, 0)
    torch.testing.assert_close(mean_cells(features, height, width), expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_roi_align() -> None:
    boxes = BOXES[1:4].clone().requires_grad_()  # away from the places where a sample changes its cells
    features = a_map().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, b: roi_align(f, b, output_size=2, samples=3), (features, boxes))


def test_a_wrong_call_names_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected \(H, W, D\) and \(N, 4\), got \(5, 7, 3\) and \(4,\)"):
        roi_align(a_map(), BOXES[0], output_size=1)
    with pytest.raises(ValueError, match="output_size=0 and samples=2 must be >= 1"):
        roi_align(a_map(), BOXES, output_size=0)


def test_a_small_map_keeps_its_own_cells() -> None:
    cells = ImageCells(side=7, region_side=3)
    assert [cells.of_image(*size) for size in ((20, 5), (7, 8), (1, 1))] == [(7, 5), (7, 7), (1, 1)]
    assert cells.of_region == (3, 3)


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ((0, 0, 40, 30), None),
        ((0.5, 1, 2.5, 3), None),
        ((0, 0, 40.000001, 30.000001), None),  # 3 * (40 / 3) may be
        ((0, 0, 40.01, 30), "reaches outside"),
        ((10, 0, 5, 20), "(10, 0, 5, 20) is reversed; it must be x0, y0, x1, y1"),
        ((0, 9, 5, 8), "is reversed"),
        ((3, 4, 3, 9), "(3, 4, 3, 9) has no area"),
        ((3, 4, 8, 4), "has no area"),
        ((-1, 0, 5, 5), "reaches outside of the image of 40 x 30 pixels"),
        ((0, 0, 400, 300), "give pixels of this image"),
        ((0, 0, 5), "must be four finite numbers"),
        ((0, 0, math.nan, 5), "must be four finite numbers"),
        ((0, 0, "5", 5), "must be four finite numbers"),
    ],
)
def test_what_is_no_region(box: tuple, says: str | None) -> None:
    found = box_problem(box, width=40, height=30)
    assert (found is None) == (says is None)
    assert says is None or says in str(found)
