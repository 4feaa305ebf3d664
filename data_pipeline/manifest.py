"""What a folder of shards holds: sources, shards, counts, sizes, hashes; and the index of every sample.

<shards>/manifest.json
         <SOURCE>/<SOURCE>-00000.tar   an ordinary WebDataset shard
                  index.arrow          one row a sample, in shard order: shard, offset, size (Arrow IPC)
                  rejected.jsonl       rows of the source that were not written, and regions that were left
                                       out of others, with their reasons
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from agff.errors import DataError
from agff.files import hashing_bar, partial_path, publish, sha256_of, write_text
from data_pipeline.storage import SAFE_NAME, Folder, LocalFolder, StoredFile

MANIFEST_FILE = "manifest.json"
_INDEX_FILE = "index.arrow"
REJECTED_FILE = "rejected.jsonl"
FORMAT = 2
_LATER_FIELDS = ("most_negatives", "num_regions", "num_left_out")
"""Of a source, that a manifest of before does not have."""
_INDEX_SCHEMA = pa.schema([("shard", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class Shard(StoredFile):
    """One tar file of a source; its name is a file name inside the source's folder."""

    num_samples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_samples) is not int or self.num_samples < 0:
            raise ValueError(f"{self.num_samples!r} is no number of samples of {self.name}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One subset: its shards in order."""

    num_rows: int
    """Rows of the original data; each was written or rejected."""
    num_rejected: int
    shards: tuple[Shard, ...]
    index: StoredFile
    most_negatives: int = 1
    """Explicit negatives of one sample at most; a manifest of before does not say it, but has one or none."""
    num_regions: int = 0
    """Of all samples, where a sample is an image with regions: one of them is drawn each time. 0: pairs."""
    num_left_out: int = 0
    """Regions that could not be used, of images that were written."""

    def __post_init__(self) -> None:
        """Raises ValueError for counts that are none."""
        names = ("num_rows", "num_rejected", *_LATER_FIELDS)
        counts = {name: getattr(self, name) for name in names}
        if wrong := {name: x for name, x in counts.items() if type(x) is not int or x < 0}:
            raise ValueError(f"{wrong} are no counts")

    @property
    def num_samples(self) -> int:
        """Pairs that can be trained on."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Equal for equal shards: names, counts and hashes, all that decides what a sample's number means."""
        shards = [(shard.name, shard.num_samples, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All sources of a folder."""

    sources: Mapping[str, Source]
    settings: Mapping[str, Any]
    """Of the conversion; another conversion into the same folder must agree."""


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a shard folder. Raises DataError when there is none, it is damaged, or a name leaves
    the folder."""
    where = f"{folder.location}/{MANIFEST_FILE}"
    try:
        values = json.loads(folder.read_bytes(MANIFEST_FILE).decode("utf-8"))
        if values["format"] != FORMAT:
            raise DataError(
                f"{where}: format {values['format']} is not {FORMAT}, the one this version reads; "
                "remove the folder and run launcher/prepare.py"
            )
        sources = {
            name: Source(
                num_rows=source["num_rows"],
                num_rejected=source["num_rejected"],
                shards=tuple(Shard(**shard) for shard in source["shards"]),
                index=StoredFile(**source["index"]),
                **{name: source[name] for name in _LATER_FIELDS if name in source},
            )
            for name, source in values["sources"].items()
        }
        check_source_names(sources)
        return Manifest(sources=sources, settings=values["settings"])
    except FileNotFoundError:
        raise DataError(
            f"{folder.location}: no shards here ({MANIFEST_FILE} is missing); "
            "make them with launcher/prepare.py --mmeb DIR --out SHARDS"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = str(error) if type(error) is ValueError else repr(error)
        raise DataError(
            f"{where}: damaged manifest: {text}; restore it, or remove the folder and run launcher/prepare.py"
        ) from None


def check_source_names(names: Iterable[str]) -> None:
    """Raise ValueError for sources whose names cannot be folders of shards."""
    if wrong := [name for name in names if not re.fullmatch(SAFE_NAME, name)]:
        listed = ", ".join(map(repr, wrong))
        raise ValueError(f"not a name of a source: {listed}; letters, digits, and . _ + - inside are allowed")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json in one piece."""
    values = {
        "format": FORMAT,
        "settings": dict(manifest.settings),
        "sources": {name: asdict(source) for name, source in sorted(manifest.sources.items())},
    }
    write_text(folder / MANIFEST_FILE, json.dumps(values, indent=1) + "\n")


def write_index(source_folder: Path, samples_of_shards: Iterable[Sequence[Sequence[int]]]) -> StoredFile:
    """Write index.arrow from the (offset, size) of each sample of each shard; what the manifest says of
    it."""
    path = source_folder / _INDEX_FILE
    partial = partial_path(path)
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, _INDEX_SCHEMA) as writer:
        for shard, samples in enumerate(samples_of_shards):
            columns = [
                [shard] * len(samples),
                [offset for offset, _ in samples],
                [size for _, size in samples],
            ]
            writer.write_batch(pa.record_batch(columns, schema=_INDEX_SCHEMA))
    size_bytes = partial.stat().st_size
    sha256 = sha256_of(partial)
    publish(partial, path)
    return StoredFile(name=_INDEX_FILE, size_bytes=size_bytes, sha256=sha256)


def read_index(folder: Folder, name: str, source: Source) -> pa.Table:
    """The index of source `name`, memory-mapped: its pages are read when they are looked at. Raises
    DataError.

    Raises StorageError for a remote one that cannot be had.
    """
    where = f"{name}/{_INDEX_FILE}"
    remedy = "rebuild it with launcher/verify.py DIR --repair-index"
    try:
        with pa.memory_map(str(folder.local_path(name, source.index))) as file:
            index = pa.ipc.open_file(file).read_all()
        null_count = sum(column.null_count for column in index.columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{where}: cannot read the index: {error}; {remedy}") from None
    if not index.schema.equals(_INDEX_SCHEMA) or len(index) != source.num_samples or null_count:
        raise DataError(
            f"{where}: the index has {len(index)} samples, the manifest {source.num_samples}; {remedy}"
        )
    return index


def stored_files(manifest: Manifest) -> list[tuple[str, StoredFile]]:
    """(source, shard or index) of every file that the manifest names, always in the same order."""
    return [
        (name, file)
        for name, source in sorted(manifest.sources.items())
        for file in (*source.shards, source.index)
    ]


def check_files(
    folder: LocalFolder,
    manifest: Manifest,
    *,
    part: int,
    num_parts: int,
    hashes: bool,
    shows_progress: bool = False,
) -> list[str]:
    """One line for each missing or changed shard or index among every `num_parts`-th one.

    hashes: read the files and compare SHA-256, with a progress bar if asked; else only presence and size.
    """
    files = stored_files(manifest)[part::num_parts]
    total_bytes = sum(file.size_bytes for _, file in files)
    with hashing_bar("check shards", total_bytes, is_shown=shows_progress and hashes) as bar:
        found = [file_problem(folder, name, file, hashes=hashes, progress=bar.update) for name, file in files]
    return [problem for problem in found if problem]


def file_problem(
    folder: LocalFolder,
    source: str,
    file: StoredFile,
    *,
    hashes: bool,
    progress: Callable[[int], object] | None = None,
) -> str | None:
    """What is wrong with one file, by presence, size and (if asked) hash."""
    path = folder.local_path(source, file)
    what, remedy = "shard", "restore it, or remove the folder and run launcher/prepare.py again"
    if file.name == _INDEX_FILE:
        what, remedy = "index", "rebuild it with launcher/verify.py DIR --repair-index"
    try:
        if (found := path.stat().st_size) != file.size_bytes:
            return f"{path}: {what} has {found:,} bytes, the manifest says {file.size_bytes:,}; {remedy}"
        if not hashes:
            return None
        digest = sha256_of(path, progress=progress)
    except FileNotFoundError:
        return f"{path}: {what} is missing; {remedy}"
    except OSError as error:
        return f"{path}: cannot read the {what}: {error}; {remedy}"
    if digest != file.sha256:
        return (
            f"{path}: SHA-256 of the {what} is {digest[:12]}..., the manifest says {file.sha256[:12]}...; "
            f"{remedy}"
        )
    return None
