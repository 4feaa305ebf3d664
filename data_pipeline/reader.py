"""One sample by (shard, offset): a single read, parsed in memory."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from agff.errors import DataError
from data_pipeline.manifest import Manifest, read_index


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """The members of one sample, undecoded."""

    address: str
    """`shard.tar:key`."""
    members: dict[str, bytes]
    """By their name after the key: `json`, `query.jpg`, ..."""


class ShardReader:
    """Reads samples of a shard folder by (source, index). Keeps the memory-mapped indexes, no shard file open."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._indexes = {name: read_index(folder, name) for name in manifest.sources}
        for name, index in self._indexes.items():
            if len(index) != manifest.sources[name].num_samples:
                raise DataError(
                    f"{folder / name}: the index has {len(index)} samples, the manifest "
                    f"{manifest.sources[name].num_samples}; run launcher/prepare.py again"
                )

    def read(self, source: str, sample: int) -> RawSample:
        """The sample's members. Raises DataError with the shard's name when they are not what the index says."""
        index = self._indexes[source]
        shard, offset, size = (index.column(name)[sample].as_py() for name in ("shard", "offset", "size"))
        path = self._folder / source / self._manifest.sources[source].shards[shard].name
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                content = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"{path.name}: cannot read the shard: {error}") from None
        if len(content) != size:
            raise DataError(f"{path.name}: truncated at byte {offset + len(content):,}, a sample ends at {offset + size:,}")
        return _parse(content, path.name)


def _parse(content: bytes, shard: str) -> RawSample:
    members: dict[str, bytes] = {}
    keys = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                file = tar.extractfile(member) if member.isreg() else None
                if file is None or "/" in member.name or not key or not name:
                    raise DataError(f"{shard}:{member.name}: not a plain member `<key>.<name>`")
                keys.add(key)
                members[name] = file.read()
    except tarfile.TarError as error:
        raise DataError(f"{shard}: the index points at no tar member: {error}") from None
    if len(keys) != 1:
        raise DataError(f"{shard}: the index joins members of {len(keys)} samples ({', '.join(sorted(keys)[:3])})")
    return RawSample(address=f"{shard}:{keys.pop()}", members=members)
