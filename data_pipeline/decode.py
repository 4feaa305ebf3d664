"""Bytes -> example: texts and RGB images, each error with the address of its sample."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from agff.batch import IMAGE_PLACEHOLDER, Item
from agff.errors import DataError
from data_pipeline.reader import RawSample

MAX_PIXELS = 100_000_000
"""More is a decompression bomb or a mistake: refused before the pixels are decoded."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A decoded pair."""

    query: Item
    target: Item
    query_id: int
    target_id: int
    address: str


def decode(raw: RawSample) -> Example:
    """Raises DataError for whatever is wrong with the sample; its text starts with the address."""
    try:
        record = json.loads(raw.members["json"].decode("utf-8"))
        return Example(
            query=_item(record["query"], raw),
            target=_item(record["target"], raw),
            query_id=int(record["query"]["id"]),
            target_id=int(record["target"]["id"]),
            address=raw.address,
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{raw.address}.json: text is not UTF-8: {error}") from None
    except KeyError as error:
        raise DataError(f"{raw.address}: member or field {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{raw.address}.json: not a sample's record: {error}") from None


def decode_image(content: bytes, address: str) -> Image.Image:
    """RGB, upright, transparency on white. Raises DataError with the address for anything that is no whole image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{address}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise DataError(f"{address}: {len(content):,} bytes that are no image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{address}: cannot decode {len(content):,} bytes: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: keep the upper 8
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent).convert("RGB")
    return image.convert("RGB")


def _item(record: dict[str, Any], raw: RawSample) -> Item:
    text, name = record["text"], record["image"]
    if (found := text.count(IMAGE_PLACEHOLDER)) != int(name is not None):
        raise DataError(f"{raw.address}.json: {IMAGE_PLACEHOLDER} stands {found} times, images: {int(name is not None)}")
    image = decode_image(raw.members[name], f"{raw.address}.{name}") if name is not None else None
    return Item(text=text, image=image)
