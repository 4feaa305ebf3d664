"""What a folder of shards holds: sources, shards, counts, sizes, hashes; and the index of every sample.

<shards>/manifest.json
         <SOURCE>/<SOURCE>-00000.tar   an ordinary WebDataset shard
                  index.arrow          one row a sample, in shard order: shard, offset, size (Arrow IPC, memory-mapped)
                  rejected.jsonl       rows of the source that were not written, with their reasons
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from agff.errors import DataError

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.arrow"
FORMAT = 1
INDEX_SCHEMA = pa.schema([("shard", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a source."""

    name: str
    """File name inside the source's folder."""
    num_samples: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One subset: its shards in order."""

    num_rows: int
    """Rows of the original data; each was written or rejected."""
    num_rejected: int
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Pairs that can be trained on."""
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All sources of a folder."""

    sources: Mapping[str, Source]
    settings: Mapping[str, Any]
    """What the conversion was told; another conversion into the same folder must agree."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal shards: names, counts and hashes, all that decides what a sample index means."""
        shards = {
            name: [(shard.name, shard.num_samples, shard.sha256) for shard in source.shards]
            for name, source in sorted(self.sources.items())
        }
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder. Raises DataError when there is none or it is damaged."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(
                f"{path}: format {values['format']} is not {FORMAT}, the one this version reads; prepare it again"
            )
        sources = {
            name: Source(
                num_rows=source["num_rows"],
                num_rejected=source["num_rejected"],
                shards=tuple(Shard(**shard) for shard in source["shards"]),
            )
            for name, source in values["sources"].items()
        }
        return Manifest(sources=sources, settings=values["settings"])
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no shards here ({MANIFEST_FILE} is missing); "
            f"make them with launcher/prepare.py --mmeb DIR --out {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged manifest: {error!r}; run launcher/prepare.py again") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json in one piece."""
    values = {
        "format": FORMAT,
        "settings": dict(manifest.settings),
        "sources": {name: asdict(source) for name, source in sorted(manifest.sources.items())},
    }
    partial = folder / f"{MANIFEST_FILE}.partial"
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST_FILE)


def read_index(folder: Path, source: str) -> pa.Table:
    """The source's index, memory-mapped: its pages are read when they are looked at."""
    path = folder / source / INDEX_FILE
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot read the index: {error}; run launcher/prepare.py again") from None


def check_shards(folder: Path, manifest: Manifest, *, part: int, num_parts: int, hashes: bool) -> list[str]:
    """One line for each missing or changed shard among every `num_parts`-th one; empty when all is well.

    hashes: read the files and compare SHA-256; else only their presence and size.
    """
    shards = [(name, shard) for name, source in sorted(manifest.sources.items()) for shard in source.shards]
    problems = (_problem(folder / name / shard.name, shard, hashes=hashes) for name, shard in shards[part::num_parts])
    return [problem for problem in problems if problem]


def _problem(path: Path, shard: Shard, *, hashes: bool) -> str | None:
    remedy = "restore it, or remove it and run launcher/prepare.py again"
    if not path.is_file():
        return f"{path}: shard is missing; {remedy}"
    if path.stat().st_size != shard.size_bytes:
        return f"{path}: shard has {path.stat().st_size:,} bytes, the manifest says {shard.size_bytes:,}; {remedy}"
    if not hashes:
        return None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        return f"{path}: SHA-256 of the shard is {found[:12]}..., the manifest says {shard.sha256[:12]}...; {remedy}"
    return None
