"""Where tokens and patches are: what a backbone would otherwise compute on the device, while the host waits.

A worker of the loader computes what takes loops (`packed_index`); the device adds up lengths
(`packed_arguments`). All of it is equal to what transformers' models compute (tests/agff/test_positions.py).
The Qwen towers get the patches of all images of a chunk one behind the other, "packed".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from agff.batch import ModelInputs
from agff.vision_attention import Segments


def packed_index(
    grid_N3: Tensor, *, merge_size: int, window_size: int | None, table_size: int | None
) -> dict[str, Tensor]:
    """Positions of the patches of a chunk's images (agff/processor.py lists them).

    grid_N3: patches in time, height, width. window_size: side in tokens, of Qwen2.5-VL. table_size: side of
    the table of positions, of Qwen3-VL.
    """
    from transformers import vision_utils

    index = {
        "image_position_ids": vision_utils.get_vision_position_ids(grid_N3, merge_size),
        "image_lengths": grid_N3.prod(dim=1),
    }
    if window_size is not None:
        orders = [
            vision_utils.get_vision_window_index(grid_13, merge_size, window_size * merge_size, patch_size=1)[
                0
            ]
            for grid_13 in grid_N3.split(1)
        ]
        index["image_window_index"] = torch.cat(orders)
        index["window_lengths"] = torch.tensor(window_lengths(grid_N3, merge_size, window_size))
    if table_size is not None:
        index["image_interp_indices"], index["image_interp_weights"] = (
            vision_utils.get_vision_interpolation_indices_and_weights(
                grid_N3, table_size, mode="bilinear", align_corners=True, spatial_merge_size=merge_size
            )
        )
    return index


def packed_arguments(inputs: ModelInputs, *, merge_size: int, window_size: int | None) -> dict[str, Any]:
    """Keyword arguments of a Qwen tower, as its backbone knows them, for a chunk on the device, but for the
    sizes, which are on the host.

    `packed_index`'s tensors, and where each image and each window begins, for the device and for the host.
    """
    length_N, grid_N3 = inputs["image_lengths"], inputs["image_grid_thw"]
    lengths = grid_N3.prod(dim=1).tolist()
    lengths_only = ("image_lengths", "window_lengths")
    arguments: dict[str, Any] = {name: x for name, x in inputs.items() if name not in lengths_only} | {
        "image_cu_seqlens": boundaries(length_N),
        "image_max_seqlen": max(lengths),
        "image_segments": (Segments(lengths),),
    }
    if window_size is None:
        return arguments
    in_windows = window_lengths(grid_N3, merge_size, window_size)
    return arguments | {
        "image_window_index": offset_by_image(inputs["image_window_index"], length_N // merge_size**2),
        "image_cu_window_seqlens": boundaries(inputs["window_lengths"]),
        "image_max_window_seqlen": max(in_windows),
        "image_segments": (Segments(lengths), Segments(in_windows)),
    }


def mrope_position_ids(is_image_BT: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, 3, T) int64: time, height and width of each token in M-RoPE (Qwen2-VL, arXiv 2409.12191, 2.1).

    A text counts on from token to token. An image is a grid at one time, and what follows it counts on from
    its longer side. sizes: (height, width) in tokens of the images, which are in at most one place in a row,
    in the order of the rows. Padding counts on like text.
    """
    position_ids = torch.arange(is_image_BT.shape[1]).repeat(len(is_image_BT), 3, 1)
    rows = is_image_BT.any(dim=1).nonzero()[:, 0].tolist()
    for row, (height, width) in zip(rows, sizes, strict=True):
        start = int(is_image_BT[row].int().argmax())
        stop = start + height * width
        position_ids[row, 0, start:stop] = start
        position_ids[row, 1, start:stop] = start + torch.arange(height).repeat_interleave(width)
        position_ids[row, 2, start:stop] = start + torch.arange(width).repeat(height)
        position_ids[row, :, stop:] += max(height, width) - height * width
    return position_ids


def sizes_in_tokens(grid_N3: Tensor, merge_size: int) -> list[tuple[int, int]]:
    """(height, width) of each image."""
    return [(height // merge_size, width // merge_size) for _, height, width in grid_N3.tolist()]


def window_lengths(grid_N3: Tensor, merge_size: int, window_size: int) -> list[int]:
    """Patches in each window of window_size x window_size tokens, image by image and row by row; windows at
    the far ends are smaller."""
    return [
        rows * columns * merge_size**2
        for height, width in sizes_in_tokens(grid_N3, merge_size)
        for rows in _parts(height, window_size)
        for columns in _parts(width, window_size)
    ]


def _parts(whole: int, side: int) -> list[int]:
    return [side] * (whole // side) + ([whole % side] if whole % side else [])


def boundaries(length_S: Tensor) -> Tensor:
    """(S + 1,) int32: where segments of these lengths begin and end, one behind the other."""
    return functional.pad(length_S.cumsum(0, dtype=torch.int32), (1, 0))


def offset_by_image(index: Tensor, length_N: Tensor) -> Tensor:
    """The indices of N images, each from 0 on, as indices into all of them one behind the other.

    length_N: how many indices each has; their sum is the length of `index`, so that no size is read from the
    device."""
    start_N = length_N.cumsum(0) - length_N
    return index + start_N.repeat_interleave(length_N, output_size=index.shape[0])
