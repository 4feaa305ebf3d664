"""One image of several rows of a chunk: processed and encoded once, its features given to each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from PIL import Image
from torch import Tensor

IMAGE_IDS = "image_ids_U"
"""int64 content id of each of a chunk's different images: equal ids mean equal pixels."""
IMAGE_FEATURES = "image_features"
"""The vision tower's output; it takes the place of "pixel_values" once the tower has run."""
FEATURE_ROWS = "feature_rows_N"
"""int64: which image token of the different images each image token of the rows is. Only where a
chunk's rows share images."""


@dataclass(frozen=True, kw_only=True)
class SharedImages:
    """The images of a chunk's rows, each of them once."""

    unique: tuple[Image.Image, ...]
    """In the order of their first row."""
    ids: tuple[int, ...]
    """Of each unique image."""
    index: tuple[int, ...]
    """Of each row's image: its place in `unique`."""

    def inputs(self, num_image_tokens: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of this module for a chunk. num_image_tokens: of each unique image."""
        ids = {IMAGE_IDS: torch.tensor(self.ids)}
        if len(self.unique) == len(self.index):
            return ids
        tokens = torch.arange(sum(num_image_tokens)).split(list(num_image_tokens))
        return {**ids, FEATURE_ROWS: torch.cat([tokens[place] for place in self.index])}


def share(images: Sequence[Image.Image]) -> SharedImages:
    """Find the images with equal pixels. A millisecond for a megapixel: resizing one takes tens."""
    place: dict[int, int] = {}
    unique: list[Image.Image] = []
    index = []
    for image in images:
        content_id = _content_id(image)
        if content_id not in place:
            place[content_id] = len(unique)
            unique.append(image)
        index.append(place[content_id])
    return SharedImages(unique=tuple(unique), ids=tuple(place), index=tuple(index))


def _content_id(image: Image.Image) -> int:
    """64 bits of a hash: among a thousand images two different ones share an id once in 4e13 batches."""
    pixels = blake2b(image.tobytes(), digest_size=8, person=b"%dx%d" % image.size)
    return int.from_bytes(pixels.digest(), "little", signed=True)
