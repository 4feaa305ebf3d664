"""Writing one WebDataset shard: deterministic bytes, complete or absent, with a record of what is in it.

Members of a sample: `<key>.json`, and the original bytes of its images as `<key>.query.jpg`,
`<key>.target.png`, ... An image that several rows of a shard use is stored with the first of them; the
others' JSON names that member, and where its bytes are in the file: {"image": "000000012.query.jpg", "at":
[offset, size]}. The JSON has a side for each role: query, target, and where the source has explicit
negatives, negative, negative_1, negative_2, ...

The bytes are those of `webdataset.TarWriter` with fixed time, user and group; a test holds that. They are
written with tarfile because TarWriter copies each byte once more: 4,082 instead of 4,445 rows a
second in memory, 2,371 instead of 2,768 to disk (800 JPEGs of 65 kB on one core of a busy machine; webdataset
1.0.2, November 2026).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agff.errors import DataError
from agff.files import partial_path, publish, sha256_of
from agff.images import SHARD_FORMATS, read_header, read_image_file
from data_pipeline.layouts.training_rows import Pair, Side
from data_pipeline.reader import negative_role

SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Of an image's member, by its format."""


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
    most_negatives: int = 1
    """Explicit negatives of one sample at most; a record of before has one or none."""


def write_shard(path: Path, pairs: Iterable[Pair | str], *, first_row: int) -> ShardRecord:
    """Write the pairs as `path` and return its record; a string among them is a reason to reject that row.

    The bytes depend on the pairs alone. The file appears under its name when it is complete and on disk.
    Raises OSError when the file system fails, in reading an image as in writing.
    """
    samples: list[tuple[int, int]] = []
    rejected: list[tuple[int, str]] = []
    most_negatives = 0
    stored: dict[bytes, _Stored] = {}
    partial = partial_path(path)
    with partial.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, pair in enumerate(pairs, start=first_row):
            try:
                if isinstance(pair, str):
                    raise DataError(pair)
                members = _members(pair, row, stored)
            except DataError as error:
                rejected.append((row, str(error)))
                continue
            offset = tar.offset
            for name, content, digest in members:
                header = tarfile.TarInfo(f"{row:09d}.{name}")
                header.size, header.mode = len(content), 0o644
                if digest is not None:
                    stored[digest] = _Stored(name=header.name, offset=tar.offset + tarfile.BLOCKSIZE)
                tar.addfile(header, io.BytesIO(content))
            samples.append((offset, tar.offset - offset))
            most_negatives = max(most_negatives, len(pair.negatives))
    sha256 = sha256_of(partial)
    size_bytes = partial.stat().st_size
    publish(partial, path)
    return ShardRecord(
        num_samples=len(samples),
        size_bytes=size_bytes,
        sha256=sha256,
        samples=samples,
        rejected=rejected,
        most_negatives=most_negatives,
    )


def content_id(text: str, image: bytes | None) -> int:
    """63-bit id of an item's content; equal ids mean equal text and image bytes."""
    return _content_id(text, _sha256(image) if image is not None else None)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where the bytes of an image are in the shard."""

    name: str
    offset: int


def _members(pair: Pair, row: int, stored: Mapping[bytes, _Stored]) -> list[tuple[str, bytes, bytes | None]]:
    """(name, content, SHA-256 of an image) of each member."""
    record: dict[str, Any] = {"row": row}
    images: dict[bytes, tuple[str, bytes, bytes]] = {}
    roles = ("query", "target", *map(negative_role, range(len(pair.negatives))))
    for role, side in zip(roles, pair.sides, strict=True):
        image, suffix = _read_image(side, role)
        digest = _sha256(image) if image is not None else None
        record[role] = {"text": side.text, "image": None, "id": _content_id(side.text, digest)}
        if side.instruction:
            record[role]["instruction"] = side.instruction
        if image is None or digest is None:
            continue
        if earlier := stored.get(digest):
            record[role] |= {"image": earlier.name, "at": [earlier.offset, len(image)]}
        else:
            record[role]["image"] = images.setdefault(digest, (f"{role}.{suffix}", image, digest))[0]
    content = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    return [("json", content, None), *images.values()]


def _content_id(text: str, image_digest: bytes | None) -> int:
    return int.from_bytes(_sha256(text.encode() + b"\0" + (image_digest or b""))[:8], "big") >> 1


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _read_image(side: Side, role: str) -> tuple[bytes | None, str]:
    """(original bytes, suffix of their format) of an image that is whole as far as its header and end say.

    Raises DataError for a row that cannot be used, OSError when the file system fails: the row must not be
    lost by that.
    """
    if side.image is None:
        return None, ""
    address = f"{role}: image {side.image}"
    content = read_image_file(side.image, address)
    return content, SUFFIX[read_header(content, address, formats=SHARD_FORMATS).format]
