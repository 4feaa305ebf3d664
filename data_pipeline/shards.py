"""Writing one WebDataset shard: deterministic bytes, complete or absent, with a record of what is in it.

Members of a sample: `<key>.json`, and the original bytes of its images as `<key>.query.jpg`,
`<key>.target.png`, ... An image that several rows of a shard use is stored with the first of them; the
others' JSON names that member, and where its bytes are in the file: {"image": "000000012.query.jpg", "at":
[offset, size]}. The JSON has a side for each role: query, target, and where the source has explicit
negatives, negative, negative_1, negative_2, ...; of an image with regions see data_pipeline/regions.py.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from agff.files import partial_path, publish, sha256_of
from agff.images import SHARD_FORMATS, read_header, read_image_file
from data_pipeline.layouts.eval_items import EmbeddedImage
from data_pipeline.layouts.training_rows import IMAGE_ALONE, Pair, RegionRow, Side
from data_pipeline.reader import negative_role
from data_pipeline.regions import id_of_digest, region_fields

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
    num_regions: int = 0
    """Of all samples, in each of which one is drawn."""
    left_out: list[tuple[int, str]] = field(default_factory=list)
    """(row, reason) of each region that was left out of an image that was written."""


def write_shard(path: Path, rows: Iterable[Pair | RegionRow | str], *, first_row: int) -> ShardRecord:
    """Write the rows as `path` and return its record; a string among them is a reason to reject that row.

    The bytes depend on the rows alone. The file appears under its name when it is complete and on disk.
    Raises OSError when the file system fails, in reading an image as in writing.
    """
    samples: list[tuple[int, int]] = []
    rejected: list[tuple[int, str]] = []
    left_out: list[tuple[int, str]] = []
    most_negatives = num_regions = 0
    stored: dict[bytes, _Stored] = {}
    partial = partial_path(path)
    with partial.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows, start=first_row):
            try:
                sample = _sample(row, number, stored)
            except DataError as error:
                rejected.append((number, str(error)))
                continue
            offset = tar.offset
            for name, content, digest in sample.members():
                header = tarfile.TarInfo(f"{number:09d}.{name}")
                header.size, header.mode = len(content), 0o644
                if digest is not None:
                    stored[digest] = _Stored(name=header.name, offset=tar.offset + tarfile.BLOCKSIZE)
                tar.addfile(header, io.BytesIO(content))
            samples.append((offset, tar.offset - offset))
            left_out += [(number, reason) for reason in sample.left_out]
            most_negatives = max(most_negatives, sample.num_negatives)
            num_regions += len(sample.record.get("regions", ()))
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
        num_regions=num_regions,
        left_out=left_out,
    )


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where the bytes of an image are in the shard."""

    name: str
    offset: int


class _Sample:
    """A sample's record and the images that are stored with it."""

    def __init__(self, number: int, stored: Mapping[bytes, _Stored]) -> None:
        self.record: dict[str, Any] = {"row": number}
        self.left_out: list[str] = []
        self.num_negatives = 0
        self._stored = stored
        self._images: dict[bytes, tuple[str, bytes, bytes]] = {}

    def members(self) -> list[tuple[str, bytes, bytes | None]]:
        """(name, content, SHA-256 of an image) of each."""
        content = json.dumps(self.record, ensure_ascii=False, separators=(",", ":")).encode()
        return [("json", content, None), *self._images.values()]

    def add(self, role: str, side: Side) -> tuple[bytes, bytes] | None:
        """Add a side; (bytes, SHA-256) of its image."""
        image, suffix = _read_image(side, role)
        digest = hashlib.sha256(image).digest() if image is not None else None
        values: dict[str, Any] = {"text": side.text, "image": None, "id": id_of_digest(side.text, digest)}
        self.record[role] = values
        if side.instruction:
            values["instruction"] = side.instruction
        if image is None or digest is None:
            return None
        if earlier := self._stored.get(digest):
            values |= {"image": earlier.name, "at": [earlier.offset, len(image)]}
        else:
            values["image"] = self._images.setdefault(digest, (f"{role}.{suffix}", image, digest))[0]
        return image, digest


def _sample(row: Pair | RegionRow | str, number: int, stored: Mapping[bytes, _Stored]) -> _Sample:
    """Raises DataError for a row that cannot be used."""
    if isinstance(row, str):
        raise DataError(row)
    sample = _Sample(number, stored)
    if isinstance(row, Pair):
        roles = ("query", "target", *map(negative_role, range(len(row.negatives))))
        for role, side in zip(roles, row.sides, strict=True):
            sample.add(role, side)
        sample.num_negatives = len(row.negatives)
        return sample
    side = Side(text=MMEB_TEXTS.image_alone, image=row.image, instruction=IMAGE_ALONE)
    added = sample.add("query", side)
    assert added is not None, "it has an image"
    size = read_header(added[0], f"query: image {row.image_name}", formats=SHARD_FORMATS).size
    fields, sample.left_out = region_fields(row, side.text, added[1], size)
    sample.record |= fields
    return sample


def _read_image(side: Side, role: str) -> tuple[bytes | None, str]:
    """(original bytes, suffix of their format) of an image that is whole as far as its header and end say.

    Raises DataError for a row that cannot be used, OSError when the file system fails: the row must not be
    lost by that.
    """
    if side.image is None:
        return None, ""
    if isinstance(side.image, EmbeddedImage):
        address, content = f"{role}: image {side.image.name}", side.image.content
    else:
        address = f"{role}: image {side.image}"
        content = read_image_file(side.image, address)
    return content, SUFFIX[read_header(content, address, formats=SHARD_FORMATS).format]
