"""Regions of a feature map: means over cells, and bilinear samples of a box.

Both are products with a matrix for each axis, so gradients are summed in one order on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""
ROUNDING = 1e-3
"""Pixels that a box may reach outside of its image: where both were scaled, its sides are rounded."""


@dataclass(frozen=True, kw_only=True)
class ImageCells:
    """How many tokens an image and a region have where a head pools them (`Head.image_tokens`)."""

    side: int
    """Cells a side of an image at most; a smaller map has its own number."""
    region_side: int
    """Cells a side of a region."""

    def of_image(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of cells of a map of that many tokens."""
        return min(self.side, height), min(self.side, width)

    @property
    def of_region(self) -> tuple[int, int]:
        """(rows, columns) of cells of a region."""
        return self.region_side, self.region_side


def box_problem(box: object, *, width: int, height: int) -> str | None:
    """Why this cannot be a region of an image of that size in pixels; None when it can.

    It must be four finite numbers x0, y0, x1, y1 with x0 < x1 and y0 < y1, inside the image."""
    numbers = list(box) if isinstance(box, Sequence) else []
    if len(numbers) != 4 or not all(isinstance(x, Real) and math.isfinite(x) for x in numbers):
        return f"box {box!r:.80} must be four finite numbers x0, y0, x1, y1"
    x0, y0, x1, y1 = numbers
    shown = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if x1 < x0 or y1 < y0:
        return f"{shown} is reversed; it must be x0, y0, x1, y1 with x0 < x1 and y0 < y1"
    if x1 == x0 or y1 == y0:
        return f"{shown} has no area; it must be x0, y0, x1, y1 with x0 < x1 and y0 < y1"
    if min(x0, y0) < -ROUNDING or x1 > width + ROUNDING or y1 > height + ROUNDING:
        return (
            f"{shown} reaches outside of the image of {width} x {height} pixels; give pixels of this image, "
            "not of another size of it"
        )
    return None


def mean_cells(map_HWD: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns, D) means over the cells of torch's adaptive pooling; neighbours share a row or column
    of the map where the numbers do not divide its sides."""
    height, width = map_HWD.shape[:2]
    rows_PH, columns_QW = (
        _mean_weights(size, parts).to(map_HWD) for size, parts in ((height, rows), (width, columns))
    )
    return torch.einsum("ph,hqd->pqd", rows_PH, torch.einsum("qw,hwd->hqd", columns_QW, map_HWD))


def roi_align(features_HWD: Tensor, boxes_N4: Tensor, *, output_size: int, samples: int = 2) -> Tensor:
    """(N, s, s, D) means of bilinear samples over the s x s bins of each box; differentiable in both
    arguments.

    The convention is torchvision's with aligned=True (Mask R-CNN, arXiv 1703.06870, without its half a pixel
    of shift): the centre of cell i is at i + 1/2; a sample beyond the outermost centres takes the cell there,
    one more than half a cell outside of the map counts 0. The box of the whole map gives the adaptive mean
    where `samples` points fall on, or evenly around, the centres: `samples` a multiple or a half of the cells
    of a bin.

    boxes_N4: x0, y0, x1, y1 in cells of the map. output_size: s. samples: along each side of a bin.
    """
    if features_HWD.ndim != 3 or boxes_N4.ndim != 2 or boxes_N4.shape[1] != 4:
        raise ValueError(
            f"expected (H, W, D) and (N, 4), got {tuple(features_HWD.shape)} and {tuple(boxes_N4.shape)}"
        )
    if output_size < 1 or samples < 1:
        raise ValueError(f"output_size={output_size} and samples={samples} must be >= 1")
    boxes_N4 = boxes_N4.to(torch.promote_types(boxes_N4.dtype, torch.float32))
    height, width = features_HWD.shape[:2]
    rows_NSH = _sample_weights(boxes_N4[:, 1], boxes_N4[:, 3], height, output_size, samples)
    columns_NSW = _sample_weights(boxes_N4[:, 0], boxes_N4[:, 2], width, output_size, samples)
    columns_NHSD = torch.einsum("nsw,hwd->nhsd", columns_NSW.to(features_HWD.dtype), features_HWD)
    return torch.einsum("nrh,nhsd->nrsd", rows_NSH.to(features_HWD.dtype), columns_NHSD)


def _mean_weights(size: int, parts: int) -> Tensor:
    """(parts, size) rows sum to 1: part i is from floor(i size / parts) to ceil((i + 1) size / parts)."""
    weights = torch.zeros(parts, size, dtype=torch.float64)
    for part in range(parts):
        start, stop = part * size // parts, -(-(part + 1) * size // parts)
        weights[part, start:stop] = 1 / (stop - start)
    return weights


def _sample_weights(start_N: Tensor, stop_N: Tensor, size: int, output_size: int, samples: int) -> Tensor:
    """(N, s, size) weight of each cell along one axis in the mean of each bin's samples."""
    num_points = output_size * samples
    share_P = (torch.arange(num_points, device=start_N.device, dtype=start_N.dtype) + 0.5) / num_points
    place_NP = start_N[:, None] + (stop_N - start_N)[:, None] * share_P - 0.5
    is_inside_NP = (place_NP >= -1) & (place_NP <= size)
    cells_C = torch.arange(size, device=start_N.device, dtype=start_N.dtype)
    weights_NPC = (1 - (place_NP.clamp(0, size - 1)[..., None] - cells_C).abs()).clamp(min=0)
    weights_NPC = weights_NPC * is_inside_NP[..., None]
    return weights_NPC.unflatten(1, (output_size, samples)).mean(dim=2)
