"""The one road from an image file, its bytes or a PIL object to what a model sees: RGB, upright, transparency
on white.

The rule for every mode, the same in training and in use:

  orientation          EXIF (or XMP) of any format is applied; the result carries none: never applied twice
  transparency         alpha, premultiplied alpha, palettes and colour keys are blended with white
  16 bits a level      I;16 of either byte order, and I: the upper 8 bits
  floats (F)           levels from 0 to 255, cut to whole numbers
  1, L, P, CMYK, ...   as Pillow converts them; it undoes the inversion of Adobe's CMYK when it reads a JPEG
  several pictures     the first of a file; of a PIL object the one it is at

Levels of which nobody can know what is black and what is white are refused.
"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile

from agff.errors import DataError
from agff.file_kind import HEAD_BYTES, file_kind

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
"""Of the images in shards: what training reads by the million is a short list."""
FORMATS = (*SHARD_FORMATS, "GIF", "BMP", "TIFF", "PPM")
"""Image files that are opened at all: Pillow would hand others, such as EPS, to a program of the machine."""
MAX_PIXELS = 100_000_000
"""More is a decompression bomb or a mistake: refused before the pixels are decoded."""
MAX_IMAGE_BYTES = 64 * 2**20
"""Of one image file."""
DRAFT_MARGIN = 2
"""A JPEG is decoded at a half, quarter or eighth of its size when each side keeps this many times what the
model sees."""


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What is known of an image without its pixels."""

    format: str
    size: tuple[int, int]
    """(width, height) in pixels, upright."""


_TAIL_BYTES = 1024
_END_OF = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""How a whole file ends. Neither occurs in compressed data: a cut file has it there by accident only."""
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation. Pillow's exif_transpose also writes the other tags again, and fails where one of them
has another type than it expects."""
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
_NOT_A_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_KEY_IN_PILLOWS_DEPTH: dict[str, Callable[[int], int]] = {
    "L;2": lambda level: level * 85,
    "L;4": lambda level: level * 17,
    "RGB;16B": lambda level: level >> 8,
}
"""PNG's transparent level is in the file's depth, Pillow's levels have 8 bits; by raw mode. Of a PIL
image that was loaded before, nobody knows the file's depth any more."""


def open_image(image: str | Path | Image.Image, address: str) -> Image.Image:
    """What a model sees of a file or a PIL object, which is left as it is. Raises DataError with the address
    when it cannot be had."""
    if not isinstance(image, Image.Image):
        try:
            content = read_image_file(Path(image), address)
        except OSError as error:
            raise DataError(f"{address}: cannot be read: {error.strerror or error}") from None
        return decode_image(content, address, formats=FORMATS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_pixels(image, address)
            return _as_model_sees(image, address)
    except DataError:
        raise
    except Exception as error:  # as in _opened
        raise DataError(f"{address}: cannot be decoded: {_reason(error)}") from None


def decode_image(
    content: bytes, address: str, *, formats: Sequence[str], seen_pixels: int | None = None
) -> Image.Image:
    """What a model sees of a file's bytes. Raises DataError with the address for anything that is no whole
    image.

    seen_pixels: what the model sees at most, for training only. A JPEG that is much larger is decoded at a
    fraction of its size (libjpeg's scaling, many times faster); at least DRAFT_MARGIN times what will be seen
    remains in each direction.
    """
    with _opened(io.BytesIO(content), len(content), address, formats) as image:
        num_pixels = image.width * image.height
        if seen_pixels is not None and num_pixels > seen_pixels:
            scale = DRAFT_MARGIN * math.sqrt(seen_pixels / num_pixels)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        return _as_model_sees(image, address)


def read_image_file(path: Path, address: str) -> bytes:
    """The bytes of an image file. Raises DataError when there is no such file or it is too large, OSError
    when the file system fails, which may be over the next time."""
    with _a_name_in_the_data(address):
        _check_size(_size_of_file(path, address), address)
        return path.read_bytes()


def read_header(image: bytes | Path, address: str, *, formats: Sequence[str]) -> ImageHeader:
    """What a file or its bytes say of themselves. Raises DataError for what is no whole image of these
    formats, OSError when the file system fails.

    Pixels are decoded only where the end of the file does not show that it is whole; damage in its middle is
    found when it is decoded.
    """
    if isinstance(image, bytes):
        return _header(io.BytesIO(image), len(image), address, formats)
    with _a_name_in_the_data(address):
        size_bytes = _size_of_file(image, address)
        with image.open("rb") as file:
            return _header(file, size_bytes, address, formats)


def _size_of_file(path: Path, address: str) -> int:
    """Raises DataError for what is there and no file: a pipe would be waited for, a device has no end."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{address}: is a device, pipe or socket, not a file")
    return status.st_size


def is_as_model_sees(image: Image.Image) -> bool:
    """Whether an image is RGB, with no colour that is transparent and no orientation left to apply."""
    is_opaque_rgb = image.mode == "RGB" and not image.has_transparency_data
    return is_opaque_rgb and image.getexif().get(Base.Orientation, 1) == 1


@contextmanager
def _a_name_in_the_data(address: str) -> Iterator[None]:
    """A name that is no file's is a fault of the data; a file system that fails is not."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{address}: is missing") from None
    except ValueError as error:  # a zero byte in it
        raise DataError(f"{address}: is not the name of a file: {error}") from None
    except OSError as error:
        if error.errno not in _NOT_A_NAME:
            raise
        raise DataError(f"{address}: is not the name of a file: {error.strerror}") from None


@contextmanager
def _opened(file: IO[bytes], size_bytes: int, address: str, formats: Sequence[str]) -> Iterator[ImageFile]:
    """An image within the limits, its pixels not decoded yet. Whatever Pillow raises meanwhile is a
    DataError; an OSError of the file system stays one."""
    _check_size(size_bytes, address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is refused here or harmless
            with Image.open(file, formats=tuple(formats)) as image:
                _check_pixels(image, address)
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{address}: has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow lets many kinds through, for example struct.error from broken EXIF
        if isinstance(error, OSError) and error.errno is not None:  # its own have no number
            raise
        file.seek(0)
        kind = file_kind(file.read(HEAD_BYTES))
        if kind == "empty":
            raise DataError(f"{address}: is empty") from None
        if kind not in formats:
            raise DataError(f"{address}: is {kind}, not one of {', '.join(formats)}") from None
        reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise DataError(f"{address}: is a damaged {kind}: {reason}") from None


def _header(file: IO[bytes], size_bytes: int, address: str, formats: Sequence[str]) -> ImageHeader:
    with _opened(file, size_bytes, address, formats) as image:
        # MPO is a JPEG with further pictures behind the first, as cameras write it
        kind = "JPEG" if image.format == "MPO" else image.format or ""
        size = image.size
        exif = Image.Image.getexif(image)  # PNG's own would decode the pixels to look behind them
        if exif.get(Base.Orientation, 1) in _TURNED and kind != "TIFF":  # Pillow turns that size
            size = (image.height, image.width)
        if not _has_end(file, size_bytes, kind):
            image.load()
        return ImageHeader(format=kind, size=size)


def _has_end(file: IO[bytes], size_bytes: int, kind: str) -> bool:
    """Whether the file shows that it is whole; False where only decoding can tell."""
    position = file.tell()
    try:
        if kind == "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size_bytes
        file.seek(max(0, size_bytes - _TAIL_BYTES))
        return kind in _END_OF and _END_OF[kind] in file.read()
    finally:
        file.seek(position)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _check_size(size_bytes: int, address: str) -> None:
    if size_bytes > MAX_IMAGE_BYTES:
        raise DataError(f"{address}: has {size_bytes:,} bytes, more than {MAX_IMAGE_BYTES:,}")


def _check_pixels(image: Image.Image, address: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{address}: has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    if image.width * image.height == 0:
        raise DataError(f"{address}: has {image.width} x {image.height} pixels")


def _as_model_sees(image: Image.Image, address: str) -> Image.Image:
    """A new image that carries nothing but its pixels."""
    _load(image)
    upright_by = _UPRIGHT_BY.get(image.getexif().get(Base.Orientation, 1))
    if upright_by is not None:  # one of them is 0
        image = image.transpose(upright_by)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey(image, address)
    elif image.mode == "La":
        image = image.convert("LA")  # the only way that Pillow has out of it
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
    rgb = image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {}
    return rgb


def _load(image: Image.Image) -> None:
    """Decode the pixels of an image that was opened, and bring the transparent level to their depth."""
    tile = getattr(image, "tile", None)
    raw_mode = tile[0].args if tile else None
    in_depth_of_pixels = _KEY_IN_PILLOWS_DEPTH.get(raw_mode) if isinstance(raw_mode, str) else None
    image.load()
    key = image.info.get("transparency")
    if in_depth_of_pixels and key is not None:
        image.info["transparency"] = (
            in_depth_of_pixels(key) if isinstance(key, int) else tuple(map(in_depth_of_pixels, key))
        )


def _grey(image: Image.Image, address: str) -> Image.Image:
    """8-bit levels of an image with 16 bits or floats, the transparent level white."""
    levels = np.asarray(image)
    lowest, highest = levels.min(), levels.max()
    if image.mode in ("F", "I"):
        most, unclear = (255, 1) if image.mode == "F" else (65_535, 255)
        if not (lowest >= 0 and highest <= most) or 0 < highest <= unclear:
            raise DataError(
                f"{address}: has levels from {lowest:g} to {highest:g} in Pillow's mode {image.mode}, where "
                f"0 is black and {most} is white; bring them to 0 to 255 in mode L"
            )
    grey = (levels if image.mode == "F" else levels >> 8).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[levels == key] = 255
    return Image.fromarray(grey)
