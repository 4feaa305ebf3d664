"""Lengths like those of MMEB-train and of the other data that recipes name: kinds of pairs and sizes of
images as the sets have them, chosen by us, not measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Length:
    """All that is known of an item."""

    content: int
    """Equal items have equal ones."""
    image: Size | None
    num_text_tokens: int


@dataclass(frozen=True)
class Side:
    """Queries or targets of a subset."""

    image: Size | None
    """Of the largest; a side is 0.8 to 1 of it, and a quarter of the images are turned."""
    text_tokens: tuple[int, int]
    """Least and most."""
    num_different: int = 10**15
    """How many different items there are, as of class names."""

    def draw(self, generator: np.random.Generator, count: int) -> Iterator[Length]:
        """This many items."""
        contents = generator.integers(self.num_different, size=count)
        tokens = _of_contents(self.text_tokens, contents)
        sizes: list[Size | None] = [None] * count
        if self.image is not None:
            scaled = (np.array(self.image) * generator.uniform(0.8, 1, size=(count, 2))).astype(int)
            is_turned = generator.random(count) < 0.25
            scaled[is_turned] = scaled[is_turned, ::-1]
            sizes = [(width, height) for width, height in scaled.tolist()]
        yield from map(Length, contents.tolist(), sizes, tokens.tolist())


def _of_contents(bounds: tuple[int, int], contents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Equal numbers for equal contents."""
    numbers = np.random.default_rng(0).integers(bounds[0], bounds[1] + 1, size=10**5)
    return numbers[contents % 10**5]


PHOTO = (640, 480)
SUBSETS: dict[str, tuple[Side, Side]] = {
    **{
        f"classification{n}": (Side((500, 375), (10, 30)), Side(None, (2, 8), num_different))
        for n, num_different in enumerate((1000, 24, 2, 20, 397))
    },
    **{f"vqa{n}": (Side(PHOTO, (15, 40)), Side(None, (2, 8))) for n in range(5)},
    **{f"document{n}": (Side((1700, 2200), (15, 40)), Side(None, (2, 10))) for n in range(3)},
    **{f"image_to_caption{n}": (Side(PHOTO, (10, 20)), Side(None, (12, 40))) for n in range(2)},
    **{f"caption_to_image{n}": (Side(None, (20, 90)), Side(PHOTO, (8, 20))) for n in range(3)},
    **{f"composed{n}": (Side(PHOTO, (15, 40)), Side(PHOTO, (8, 20))) for n in range(2)},
}
"""Name -> queries, targets."""

REGIONS = "regions"
_NLI = {"nli": (Side(None, (8, 30)), Side(None, (5, 20)))}
_CAPTIONED = {name: sides for name, sides in SUBSETS.items() if name.startswith("image_to_caption")}
SUBSETS_OF: dict[str, dict[str, tuple[Side, Side]]] = {
    **dict.fromkeys(("mmeb_qwen2vl_2b", "mmeb_llava_ov_7b", "unime_stage2", "fam_adapt"), SUBSETS),
    "unime_stage2_llava_ov_7b": SUBSETS,
    **dict.fromkeys(("unime_stage1", "unime_stage1_llava_ov_7b"), _NLI),
    "fam_align": {"cc3m": (Side(PHOTO, (5, 8)), Side(None, (8, 25)))},
    "mm_gem_stage1": _CAPTIONED,
    "mm_gem_stage2": {REGIONS: (Side(PHOTO, (5, 8)), Side(None, (3, 10)))},
}
"""Of each recipe's data."""
