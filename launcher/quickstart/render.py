"""Drawings from a studio's icon file: SVG text to small white-background images, twins dropped."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from agff.images import decode_image
from launcher.quickstart.concepts import Concept

TWIN_DIFFERENCE = 1.0
"""Two drawings of one studio whose pixels differ by less than this on average (of 255) are one drawing."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One concept as one studio draws it."""

    concept: Concept
    studio: str
    png: bytes

    @property
    def file_name(self) -> str:
        """Unique over all studios."""
        return f"{self.studio}_{self.concept.hexcode}.png"


def svg_of(icons: Mapping[str, Any], name: str) -> str:
    """The icon as a complete SVG; aliases are followed and their mirror images and quarter turns applied."""
    icon, h_flip, v_flip, quarter_turns = _resolve(icons, name)
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    center_x, center_y = left + width / 2, top + height / 2
    transform = (
        f"translate({center_x} {center_y}) rotate({90 * quarter_turns}) "
        f"scale({-1 if h_flip else 1} {-1 if v_flip else 1}) translate({-center_x} {-center_y})"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}"><g transform="{transform}">{icon["body"]}</g></svg>'
    )


def render_svg(svg: str, *, size_px: int) -> Image.Image:
    """A square RGB image: the drawing centred on white, its aspect ratio kept."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size_px, background="#ffffff", skip_system_fonts=True)
    image = decode_image(bytes(png), "drawing", formats=("PNG",))
    if image.size == (size_px, size_px):
        return image
    image.thumbnail((size_px, size_px))
    square = Image.new("RGB", (size_px, size_px), "white")
    square.paste(image, ((size_px - image.width) // 2, (size_px - image.height) // 2))
    return square


def render_studio(
    studio: str, icons: Mapping[str, Any], matched: Iterable[tuple[Concept, str]], *, size_px: int
) -> list[Drawing]:
    """One drawing a matched concept, in the order given, without blank ones and twins of an earlier one."""
    concepts: list[Concept] = []
    images: list[Image.Image] = []
    for concept, icon in matched:
        concepts.append(concept)
        images.append(render_svg(svg_of(icons, icon), size_px=size_px))
    if not images:
        return []
    keep = distinct_indices(np.stack([np.asarray(image) for image in images]))
    return [Drawing(concept=concepts[i], studio=studio, png=png_bytes(images[i])) for i in keep]


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def distinct_indices(pixels_NHWC: np.ndarray) -> list[int]:
    """Indices of the images that are neither blank nor within TWIN_DIFFERENCE of an earlier kept one.

    Compared first by the means of a 4 x 4 grid, which never differ more than the pixels do, then exactly.
    """
    pixels_NP = pixels_NHWC.reshape(len(pixels_NHWC), -1).astype(np.int16)
    grid_NG = _grid_means(pixels_NHWC)
    kept: list[int] = []
    for index in range(len(pixels_NP)):
        if np.ptp(pixels_NP[index]) == 0:
            continue
        near = np.abs(grid_NG[kept] - grid_NG[index]).mean(axis=1) < TWIN_DIFFERENCE
        rivals: Sequence[int] = [kept[i] for i in np.flatnonzero(near)]
        if not any(np.abs(pixels_NP[rival] - pixels_NP[index]).mean() < TWIN_DIFFERENCE for rival in rivals):
            kept.append(index)
    return kept


def _grid_means(pixels_NHWC: np.ndarray) -> np.ndarray:
    num, height, width, channels = pixels_NHWC.shape
    cell_h, cell_w = height // 4, width // 4
    if cell_h * 4 != height or cell_w * 4 != width:
        return pixels_NHWC.reshape(num, -1).mean(axis=1, keepdims=True, dtype=np.float32)
    cells = pixels_NHWC.reshape(num, 4, cell_h, 4, cell_w, channels)
    return cells.mean(axis=(2, 4), dtype=np.float32).reshape(num, -1)


def _resolve(icons: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], bool, bool, int]:
    """(icon with a body, mirrored left-right, mirrored up-down, quarter turns clockwise)."""
    h_flip, v_flip, quarter_turns = False, False, 0
    aliases = icons.get("aliases", {})
    while name not in icons["icons"]:
        alias = aliases[name]
        h_flip ^= bool(alias.get("hFlip"))
        v_flip ^= bool(alias.get("vFlip"))
        quarter_turns += int(alias.get("rotate", 0))
        name = alias["parent"]
    return icons["icons"][name], h_flip, v_flip, quarter_turns % 4
