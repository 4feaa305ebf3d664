"""Writing one WebDataset shard: deterministic bytes, complete or absent, with a record of what is in it.

Members of a sample: `<key>.json`, and the original bytes of its images as `<key>.query.jpg`, `<key>.target.png`, ...
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from agff.errors import DataError
from data_pipeline.decode import MAX_PIXELS
from data_pipeline.mmeb import Pair, Side

SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_IMAGE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What became of the rows of one shard."""

    num_samples: int
    size_bytes: int
    sha256: str
    samples: list[tuple[int, int]]
    """(offset, size) of each sample in the tar, all its members together."""
    rejected: list[tuple[int, str]]
    """(row, reason) of each row that was not written."""


def write_shard(path: Path, pairs: Iterable[Pair | str], *, first_row: int) -> ShardRecord:
    """Write the pairs as `path` and return its record; a string among them is a reason to reject that row.

    The bytes depend on the pairs alone. The file appears under its name when it is complete and on disk.
    """
    samples: list[tuple[int, int]] = []
    rejected: list[tuple[int, str]] = []
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, pair in enumerate(pairs, start=first_row):
            try:
                members = _members(pair, row)
            except DataError as error:
                rejected.append((row, str(error)))
                continue
            offset = tar.offset
            for name, content in members:
                header = tarfile.TarInfo(f"{row:09d}.{name}")
                header.size, header.mode = len(content), 0o644
                tar.addfile(header, io.BytesIO(content))
            samples.append((offset, tar.offset - offset))
    with partial.open("rb") as written:
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        os.fsync(written.fileno())
    size_bytes = partial.stat().st_size
    partial.replace(path)
    return ShardRecord(num_samples=len(samples), size_bytes=size_bytes, sha256=sha256, samples=samples, rejected=rejected)


def content_id(text: str, image: bytes | None) -> int:
    """63-bit id of an item's content; equal ids mean equal text and image bytes."""
    digest = hashlib.sha256(text.encode() + b"\0" + (hashlib.sha256(image).digest() if image is not None else b""))
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def _members(pair: Pair | str, row: int) -> list[tuple[str, bytes]]:
    if isinstance(pair, str):
        raise DataError(pair)
    record: dict[str, Any] = {"row": row}
    images: list[tuple[str, bytes]] = []
    for role, side in (("query", pair.query), ("target", pair.target), ("negative", pair.negative)):
        if side is None:
            continue
        image, suffix = _read_image(side, role)
        if image is not None:
            images.append((f"{role}.{suffix}", image))
        record[role] = {"text": side.text, "image": f"{role}.{suffix}" if image is not None else None}
        record[role]["id"] = content_id(side.text, image)
    content = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    return [("json", content), *images]


def _read_image(side: Side, role: str) -> tuple[bytes | None, str]:
    """(original bytes, suffix of their format); the header is read, the pixels are not."""
    if side.image is None:
        return None, ""
    try:
        if side.image.stat().st_size > MAX_IMAGE_BYTES:
            raise DataError(f"{role}: {side.image} is larger than {MAX_IMAGE_BYTES:,} bytes")
        content = side.image.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{role}: {side.image} has {image.size} pixels, more than {MAX_PIXELS:,}")
            return content, SUFFIX[image.format or ""]
    except FileNotFoundError:
        raise DataError(f"{role}: image {side.image} is missing") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{role}: {side.image}: cannot read the image: {error}") from None
    except KeyError as error:
        raise DataError(f"{role}: {side.image}: image format {error} is none of {', '.join(SUFFIX)}") from None
