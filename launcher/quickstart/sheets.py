"""Sheets of four drawings by one studio, for grounding: the crop is one of them, pixel for pixel."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from agff.images import decode_image
from launcher.quickstart.render import Drawing, png_bytes

POSITIONS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Four drawings in reading order and the one that is asked for."""

    cells: tuple[Drawing, Drawing, Drawing, Drawing]
    truth: int
    by_position: bool
    """Asked for by where it is, not by its name."""

    @property
    def phrase(self) -> str:
        """How the truth is asked for."""
        return POSITIONS[self.truth] if self.by_position else self.cells[self.truth].concept.text

    @property
    def distractor(self) -> Drawing:
        """Another drawing of the sheet."""
        return self.cells[(self.truth + 1) % 4]

    def png(self) -> bytes:
        """The sheet: two by two, each cell as large as a drawing."""
        images = [_image_of(cell) for cell in self.cells]
        width, height = images[0].size
        sheet = Image.new("RGB", (2 * width, 2 * height), "white")
        for image, (_, (left, top, _, _)) in zip(images, self.boxes(), strict=True):
            sheet.paste(image, (left, top))
        return png_bytes(sheet)

    def boxes(self) -> list[tuple[Drawing, tuple[int, int, int, int]]]:
        """Each drawing and where it is: x0, y0, x1, y1 in pixels of the sheet."""
        width, height = _image_of(self.cells[0]).size
        places = [(index % 2 * width, index // 2 * height) for index in range(4)]
        return [
            (cell, (left, top, left + width, top + height))
            for cell, (left, top) in zip(self.cells, places, strict=True)
        ]


def _image_of(drawing: Drawing) -> Image.Image:
    return decode_image(drawing.png, drawing.concept.text, formats=("PNG",))


def make_sheets(drawings: Sequence[Drawing], *, num_sheets: int, seed: int) -> list[Sheet]:
    """`num_sheets` sheets with distinct truths (fewer when there are fewer drawings), chosen by the seed.

    Half have distractors of the truth's own group, so that the name must be read; one in four asks by
    position. Drawings by different studios never share a sheet.
    """
    rng = random.Random(seed)
    by_studio: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        by_studio[drawing.studio].append(drawing)
    truths = [drawing for drawing in drawings if len(by_studio[drawing.studio]) >= 4]
    chosen = rng.sample(truths, min(num_sheets, len(truths)))
    return [_make_sheet(truth, by_studio[truth.studio], rng) for truth in chosen]


def _make_sheet(truth: Drawing, studio: Sequence[Drawing], rng: random.Random) -> Sheet:
    others = [drawing for drawing in studio if drawing.concept.name != truth.concept.name]
    same_group = [drawing for drawing in others if drawing.concept.group == truth.concept.group]
    pool = same_group if len(same_group) >= 3 and rng.random() < 0.5 else others
    cells = [truth, *rng.sample(pool, 3)]
    rng.shuffle(cells)
    first, second, third, fourth = cells
    return Sheet(
        cells=(first, second, third, fourth), truth=cells.index(truth), by_position=rng.random() < 0.25
    )
