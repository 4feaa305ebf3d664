"""One sample by (source, number): one read for the sample, one for each image that an earlier sample of the
shard holds."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agff.errors import DataError, StorageError
from agff.images import MAX_IMAGE_BYTES
from data_pipeline.manifest import Manifest, Shard, read_index
from data_pipeline.storage import Folder

PAIR_ROLES = ("query", "target")
NOT_A_RECORD = (ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""What Python raises on JSON of another shape, too large a number, too deep a nesting."""


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """The bytes of an image file, undecoded."""

    address: str
    """`shard.tar:member`."""
    content: bytes


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """The record of one sample and its images."""

    address: str
    """`shard.tar:key`."""
    record: Mapping[str, Any]
    """The sample's JSON (data_pipeline/shards.py)."""
    images: Mapping[str, RawImage]
    """By role (`roles_of`)."""


def roles_of(record: Mapping[str, Any]) -> list[str]:
    """The sides that a sample's record has, in their order: query, target, negative, negative_1, ..."""
    negatives = itertools.takewhile(record.__contains__, map(negative_role, itertools.count()))
    return [*(role for role in PAIR_ROLES if role in record), *negatives]


def negative_role(number: int) -> str:
    """Role of a sample's explicit negative, counted from 0. The first has no number: once it was the only
    one."""
    return f"negative_{number}" if number else "negative"


class ShardReader:
    """Reads samples of a shard folder by (source, number). Keeps the memory-mapped indexes, no shard file
    open."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        """Raises DataError for an index that is missing, damaged or of other shards, StorageError for one out
        of reach."""
        self.folder, self._manifest = folder, manifest
        self._indexes = {name: read_index(folder, name, source) for name, source in manifest.sources.items()}

    def read(self, source: str, sample: int) -> RawSample:
        """The sample. Raises DataError with the shard's name, and its key if known, when it is not what the
        index says.

        Raises StorageError when the shard cannot be had at all.
        """
        shard, offset, size = self._where(source, sample)
        try:
            descriptor = self.folder.open(source, shard)
        except OSError as error:
            raise StorageError(f"{shard.name}: cannot read the shard: {error}") from None
        try:

            def read_range(start: int, length: int) -> bytes:
                return _read_range(descriptor, shard, start, length)

            return parse_sample(read_range(offset, size), shard.name, read_range)
        except OSError as error:
            raise StorageError(f"{shard.name}: cannot read the shard: {error}") from None
        finally:
            os.close(descriptor)

    def shard_name(self, source: str, sample: int) -> str:
        """File name of the shard that holds the sample."""
        return self._where(source, sample)[0].name

    def fetch_ahead(self, source: str, samples: Iterable[int]) -> None:
        """Say that the samples will be wanted soon; returns at once. Each of their shards is asked for
        once."""
        shards = {shard.name: shard for shard in (self._where(source, int(n))[0] for n in samples)}
        for shard in shards.values():
            self.folder.fetch_ahead(source, shard)

    def _where(self, source: str, sample: int) -> tuple[Shard, int, int]:
        index = self._indexes[source]
        shard, offset, size = (index.column(name)[sample].as_py() for name in ("shard", "offset", "size"))
        shards = self._manifest.sources[source].shards
        if not 0 <= shard < len(shards):
            raise DataError(
                f"{source}: the index names shard {shard} for sample {sample}, there are {len(shards)}"
            )
        return shards[shard], offset, size


def parse_sample(content: bytes, shard: str, read_range: Callable[[int, int], bytes]) -> RawSample:
    """The sample whose members are `content`. read_range: (offset, size) in the shard -> bytes. Raises
    DataError."""
    key, members = _members(content, shard)
    address = f"{shard}:{key}"
    try:
        record = json.loads(members["json"].decode("utf-8"))
        sides = {role: record[role] for role in roles_of(record)}
        images = {
            role: _image(side, shard, key, members, read_range)
            for role, side in sides.items()
            if side["image"]
        }
    except UnicodeDecodeError as error:
        raise DataError(f"{address}.json: text is not UTF-8: {error}") from None
    except KeyError as error:
        raise DataError(f"{address}: member or field {error} is missing") from None
    except DataError:
        raise
    except NOT_A_RECORD as error:
        raise DataError(f"{address}.json: not a sample's record: {error}") from None
    return RawSample(address=address, record=record, images=images)


def _image(
    side: Mapping[str, Any],
    shard: str,
    key: str,
    members: Mapping[str, bytes],
    read_range: Callable[[int, int], bytes],
) -> RawImage:
    name = str(side["image"])
    if "at" not in side:
        return RawImage(address=f"{shard}:{key}.{name}", content=members[name])
    offset, size = map(int, side["at"])
    return RawImage(address=f"{shard}:{name}", content=read_range(offset, size))


def _members(content: bytes, shard: str) -> tuple[str, dict[str, bytes]]:
    members: dict[str, bytes] = {}
    keys = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                is_plain = member.isreg() and not member.issparse() and member.size <= len(content)
                file = tar.extractfile(member) if is_plain else None
                if file is None or "/" in member.name or not key or not name:
                    raise DataError(f"{shard}:{member.name}: not a plain member `<key>.<name>`")
                if name in members:
                    raise DataError(f"{shard}:{member.name}: the member is there twice")
                keys.add(key)
                members[name] = file.read()
    except (tarfile.TarError, UnicodeError) as error:
        raise DataError(f"{shard}: the index points at no tar member: {error}") from None
    if len(keys) != 1:
        raise DataError(
            f"{shard}: the index joins members of {len(keys)} samples ({', '.join(sorted(keys)[:3])})"
        )
    return keys.pop(), members


def _read_range(descriptor: int, shard: Shard, offset: int, size: int) -> bytes:
    if offset < 0 or not 0 < size <= 4 * MAX_IMAGE_BYTES or offset + size > shard.size_bytes:
        raise DataError(
            f"{shard.name}: bytes {offset:,} to {offset + size:,} are not in a shard of {shard.size_bytes:,}"
        )
    content = os.pread(descriptor, size, offset)
    if len(content) != size:
        raise DataError(
            f"{shard.name}: truncated at byte {offset + len(content):,}, a sample ends at {offset + size:,}"
        )
    return content
