"""Small copies of images, as a page holds them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image, ImageDraw

THUMBNAIL_PX = 192
"""Longer side of a picture on a page, at most."""
FRAME_COLOUR = "#e3116c"
"""Of the frame around a region."""


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small copy of an image."""

    data_uri: str
    original_size: tuple[int, int]
    """Width and height of the image itself."""


def make_thumbnail(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> Thumbnail:
    """A copy of at most THUMBNAIL_PX on its longer side, as JPEG or PNG, whichever is smaller, with a frame
    around the region."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    if box is not None:
        scales = (small.width / image.width, small.height / image.height) * 2
        frame = [value * scale for value, scale in zip(box, scales, strict=True)]
        ImageDraw.Draw(small).rectangle(frame, outline=FRAME_COLOUR, width=2)
    encoded = {}
    for name in ("jpeg", "png"):
        with io.BytesIO() as file:
            small.save(file, format=name, optimize=True)
            encoded[name] = file.getvalue()
    kind, content = min(encoded.items(), key=lambda entry: len(entry[1]))
    return Thumbnail(
        data_uri=f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}",
        original_size=image.size,
    )
