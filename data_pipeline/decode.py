"""Bytes -> example: texts and RGB images, each error with the address of its sample."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from agff.batch import IMAGE_PLACEHOLDER, NO_CONTENT, Item
from agff.errors import DataError
from data_pipeline.reader import NOT_A_RECORD, RawSample

MAX_PIXELS = 100_000_000
"""More is a decompression bomb or a mistake: refused before the pixels are decoded."""


FORMATS = ("JPEG", "PNG", "WEBP")
"""Of the images in shards; nothing else is even looked at."""
DRAFT_MARGIN = 2
"""A JPEG is decoded at a half, quarter or eighth of its size when each side stays so many times what the
model sees."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A decoded pair."""

    query: Item
    target: Item
    negative: Item | None
    """Explicit hard negative, where the source has one."""
    query_id: int
    target_id: int
    negative_id: int
    """NO_CONTENT without a negative."""
    address: str

    @property
    def items(self) -> tuple[Item, ...]:
        """Query, target and, if there is one, negative."""
        return (self.query, self.target, *((self.negative,) if self.negative else ()))


def decode(raw: RawSample, *, with_negative: bool = True, seen_pixels: int | None = None) -> Example:
    """Raises DataError for whatever is wrong with the sample; its text starts with the address.

    with_negative: False leaves an explicit negative out. seen_pixels: what the model sees of one image at
    most.
    """
    record = raw.record
    try:
        with_negative = with_negative and "negative" in record
        return Example(
            query=_item("query", raw, seen_pixels),
            target=_item("target", raw, seen_pixels),
            negative=_item("negative", raw, seen_pixels) if with_negative else None,
            query_id=_content_id(record["query"]["id"]),
            target_id=_content_id(record["target"]["id"]),
            negative_id=_content_id(record["negative"]["id"]) if with_negative else NO_CONTENT,
            address=raw.address,
        )
    except KeyError as error:
        raise DataError(f"{raw.address}: member or field {error} is missing") from None
    except NOT_A_RECORD as error:
        raise DataError(f"{raw.address}.json: not a sample's record: {error}") from None


def decode_image(content: bytes, address: str, *, seen_pixels: int | None = None) -> Image.Image:
    """RGB, upright, transparency on white. Raises DataError with the address for anything that is no whole
    image.

    seen_pixels: what the model sees at most. A JPEG that is much larger is decoded at a fraction of its size
    (libjpeg's scaling, many times faster); at least DRAFT_MARGIN times what will be seen remains in each
    direction.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                num_pixels = image.width * image.height
                if num_pixels > MAX_PIXELS:
                    raise DataError(
                        f"{address}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
                    )
                if seen_pixels is not None and num_pixels > seen_pixels:
                    scale = DRAFT_MARGIN * math.sqrt(seen_pixels / num_pixels)
                    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise DataError(f"{address}: {len(content):,} bytes that are no image") from None
    except DataError:
        raise
    except (
        Exception
    ) as error:  # Pillow lets errors of many kinds through, for example struct.error from broken EXIF
        raise DataError(f"{address}: cannot decode {len(content):,} bytes: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: keep the upper 8
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent).convert("RGB")
    return image.convert("RGB")


def _content_id(value: int) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no content id")
    return value


def _item(role: str, raw: RawSample, seen_pixels: int | None) -> Item:
    text, image = str(raw.record[role]["text"]), raw.images.get(role)
    # JSON can hold halves of surrogate pairs, which no tokenizer takes; UnicodeEncodeError is a ValueError
    text.encode()
    if (found := text.count(IMAGE_PLACEHOLDER)) != int(image is not None):
        raise DataError(
            f"{raw.address}.json: {IMAGE_PLACEHOLDER} stands {found} times, images: {int(image is not None)}"
        )
    if image is None:
        return Item(text=text)
    return Item(text=text, image=decode_image(image.content, image.address, seen_pixels=seen_pixels))
