"""Boxes of regions: x0, y0, x1, y1 in pixels of the upright image; one rule for training and evaluation."""

from __future__ import annotations

from typing import TypeAlias

Box: TypeAlias = tuple[float, float, float, float]
_ROUNDING_PIXELS = 0.5
"""A box may end so much outside of its image: annotations are rounded. It is cut there."""


def box_problem(box: Box, size: tuple[int, int]) -> str | None:
    """Why this is no part of an image of that size; None when it is."""
    (x0, y0, x1, y1), (width, height) = box, size
    written = ", ".join(f"{value:g}" for value in box)
    if x1 < x0 or y1 < y0:
        return f"box ({written}) ends before it begins; it must be x0, y0, x1, y1"
    inside = cut_box(box, size)
    if max(abs(given - cut) for given, cut in zip(box, inside, strict=True)) > _ROUNDING_PIXELS:
        return f"box ({written}) is outside of its image of {width} x {height} pixels"
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return f"box ({written}) has no area"
    return None


def cut_box(box: Box, size: tuple[int, int]) -> Box:
    """The part of it that is inside of the image."""
    x0, y0, x1, y1 = (
        min(max(value, 0.0), float(most)) for value, most in zip(box, (*size, *size), strict=True)
    )
    return x0, y0, x1, y1
