"""Images of evaluation sets: looked at before the scoring, opened where a table holds their bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.ExifTags import Base

from agff.batch import IMAGE_FORMATS
from agff.errors import DataError
from data_pipeline.layouts.eval_items import EmbeddedImage

_END_OF = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""How a whole file of a format ends. Neither occurs in compressed data, so a cut file has it by accident
only."""
_TAIL_BYTES = 1024
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def checked_size(image: Path | EmbeddedImage) -> tuple[int, int]:
    """(width, height) of an image, upright, from its header. Raises DataError for what is no whole image.

    The pixels of a JPEG or PNG are decoded only when its end is missing; damage in the middle of a file is
    found when it is encoded.
    """
    with _as_data_error(image), _opened(image) as opened:
        if not _is_whole(image, opened.format or ""):
            opened.load()
        # asked for EXIF that it has not met yet, Pillow decodes the whole PNG
        turned = "exif" in opened.info and opened.getexif().get(Base.Orientation) in _TURNED
        return (opened.height, opened.width) if turned else opened.size


def open_embedded(image: EmbeddedImage) -> Image.Image:
    """The image of a table's bytes. Raises DataError for what is no whole image."""
    with _as_data_error(image):
        opened = _opened(image)
        opened.load()
        return opened


def _opened(image: Path | EmbeddedImage) -> Image.Image:
    file = io.BytesIO(image.content) if isinstance(image, EmbeddedImage) else image
    return Image.open(file, formats=IMAGE_FORMATS)


def _is_whole(image: Path | EmbeddedImage, image_format: str) -> bool:
    if image_format not in _END_OF:
        return False
    if isinstance(image, EmbeddedImage):
        tail = image.content[-_TAIL_BYTES:]
    else:
        with image.open("rb") as file:
            file.seek(max(0, image.stat().st_size - _TAIL_BYTES))
            tail = file.read()
    return _END_OF[image_format] in tail


@contextmanager
def _as_data_error(image: Path | EmbeddedImage) -> Iterator[None]:
    name = image.name if isinstance(image, EmbeddedImage) else image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # Pillow lets errors of many kinds through
        raise DataError(f"{name}: cannot read the image: {error}") from None
