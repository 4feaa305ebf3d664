"""Rows of a layout -> shards, index and manifest: deterministic bytes, continued after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agff.errors import ConfigError, DataError
from agff.files import sha256_of, write_text
from data_pipeline.claim import claimed
from data_pipeline.layouts.layout import Layout
from data_pipeline.layouts.mmeb_train import MmebTrain
from data_pipeline.manifest import (
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    Shard,
    Source,
    check_source_names,
    read_manifest,
    write_index,
    write_manifest,
)
from data_pipeline.shards import ShardRecord, write_shard
from data_pipeline.storage import LocalFolder

_SETTINGS_FILE = "prepare.json"
"""Marks a folder as the place of one conversion."""
_CLAIM_FILE = "prepare.lock"
"""Names the process that is writing the folder; gone when the conversion is complete."""
_RECORDS = ".records"
"""Folder, below each source, of what has been written so far; gone when the conversion is complete."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One shard to write: the unit of work."""

    layout: Layout
    out: Path
    source: str
    index: int
    start: int
    stop: int

    @property
    def path(self) -> Path:
        return self.out / self.source / f"{self.source}-{self.index:05d}.tar"

    @property
    def record_path(self) -> Path:
        return self.out / self.source / _RECORDS / f"{self.index:05d}.json"


def prepare(
    root: Path,
    out: Path,
    *,
    subsets: Sequence[str] | None = None,
    split: str = "original",
    rows_per_shard: int = 1000,
    max_rows: int | None = None,
    executor: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Manifest:
    """`convert` of an MMEB-train download."""
    return convert(
        MmebTrain(root=root, split=split),
        out,
        subsets=subsets,
        rows_per_shard=rows_per_shard,
        max_rows=max_rows,
        executor=executor,
    )


def convert(
    layout: Layout,
    out: Path,
    *,
    subsets: Sequence[str] | None,
    rows_per_shard: int,
    max_rows: int | None,
    executor: Callable[[], AbstractContextManager[Any]] | None,
) -> Manifest:
    """Write the shards of all (or the named) sources of a layout and return their manifest.

    A finished conversion with the same settings returns at once; while another process writes it, this one
    waits until that ends. Raises DataError for an unreadable input and ConfigError when `out` holds another
    conversion, both before anything is written; and DataError when the disk is full or a writer died: the
    same call then continues.

    executor: makes the pool of writers, for example `lambda: ProcessPoolExecutor(8)`; None writes in this
    process.
    """
    rows = rows_of_sources(layout, subsets, max_rows)
    settings = _settings(layout, rows, rows_per_shard)
    tasks = [
        _Task(
            layout=layout,
            out=out,
            source=source,
            index=index,
            start=start,
            stop=min(start + rows_per_shard, total),
        )
        for source, total in rows.items()
        for index, start in enumerate(range(0, total, rows_per_shard))
    ]
    with _write_errors(out):
        _check_place(out, settings)
        if not (out / MANIFEST_FILE).exists():
            out.mkdir(parents=True, exist_ok=True)
            with claimed(out / _CLAIM_FILE):
                _check_place(out, settings)  # once more: another process may have begun meanwhile
                _write_all(out, rows, tasks, settings, executor)
        _clean_up(out, rows)
    return read_manifest(LocalFolder(out))


def _write_all(
    out: Path,
    rows: dict[str, int],
    tasks: Sequence[_Task],
    settings: dict[str, Any],
    executor: Callable[[], AbstractContextManager[Any]] | None,
) -> None:
    if (out / MANIFEST_FILE).exists():
        return
    if not (out / _SETTINGS_FILE).exists():
        write_text(out / _SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
    _write_shards([task for task in tasks if not task.record_path.exists()], executor)
    _finish(out, rows, tasks, settings)


def _clean_up(out: Path, rows: Iterable[str]) -> None:
    """Remove what only an unfinished conversion needs, and what killed writers left."""
    for left in (*out.glob(_CLAIM_FILE), *out.glob("*.partial"), *out.glob("*/*.partial")):
        left.unlink(missing_ok=True)
    for subset in rows:
        shutil.rmtree(out / subset / _RECORDS, ignore_errors=True)


@contextlib.contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except BrokenExecutor as error:
        raise DataError(f"{out}: a writer died ({error}); give the same command again to continue") from None
    except OSError as error:
        raise DataError(
            f"cannot read or write {error.filename or out}: {error.strerror or error}; free space or fix "
            "the cause, then give the same command again: what is complete stays"
        ) from None


def rows_of_sources(layout: Layout, subsets: Sequence[str] | None, max_rows: int | None) -> dict[str, int]:
    """Rows to convert of each source. Raises DataError, with a line for each finding, for sources that are
    unknown, badly named, incomplete, empty or hold no text where it must be."""
    found = layout.sources()
    findings = []
    if unknown := sorted(set(subsets or ()) - set(found)):
        findings.append(f"{layout.root}: no subset {', '.join(unknown)}; there are {', '.join(found)}")
    chosen = [name for name in found if name in subsets] if subsets else found
    try:
        check_source_names(chosen)
    except ValueError as error:
        findings.append(f"{layout.root}: {error}; rename the folder, or name the others with --subsets")
    counts = {}
    for source in chosen:
        try:
            counts[source] = layout.count_rows(source)
        except DataError as error:
            findings.append(str(error))
    if findings:
        raise DataError("\n".join(findings))
    return {source: min(count, max_rows or count) for source, count in counts.items()}


def _settings(layout: Layout, rows: dict[str, int], rows_per_shard: int) -> dict[str, Any]:
    """What decides the bytes of the shards, the images aside."""
    paths = {source: layout.tables(source) for source in rows}
    inputs = {}
    with tqdm(total=sum(map(len, paths.values())), desc="hash tables", unit="file", leave=False) as bar:
        for source in rows:
            digest = hashlib.sha256()
            for path in paths[source]:
                digest.update(bytes.fromhex(sha256_of(path)))
                bar.update()
            inputs[source] = {"rows": rows[source], "sha256": digest.hexdigest()}
    return {**layout.settings, "rows_per_shard": rows_per_shard, "subsets": inputs}


def _check_place(out: Path, settings: dict[str, Any]) -> None:
    """Refuse a place that belongs to something else. Raises ConfigError."""
    marker = out / _SETTINGS_FILE
    if marker.exists():
        try:
            found = dict(json.loads(marker.read_text()))
        except (ValueError, TypeError):
            raise ConfigError(
                f"{marker} is damaged; remove {out} and convert again, or choose another --out"
            ) from None
        changed = [name for name in sorted({*settings, *found}) if settings.get(name) != found.get(name)]
        if changed:
            raise ConfigError(
                f"{out} holds a conversion with other {', '.join(changed)}; remove it, or choose another "
                "--out"
            )
        return
    begun = (_CLAIM_FILE, f"{_SETTINGS_FILE}.*.partial")  # by another process, or one that was killed at once
    if out.exists() and not all(any(map(path.match, begun)) for path in out.iterdir()):
        raise ConfigError(
            f"{out} exists and holds no conversion ({_SETTINGS_FILE} is missing); choose another --out"
        )


def _write_shards(tasks: Sequence[_Task], executor: Callable[[], AbstractContextManager[Any]] | None) -> None:
    for subset_folder in {task.record_path.parent for task in tasks}:
        subset_folder.mkdir(parents=True, exist_ok=True)
    rows = sum(task.stop - task.start for task in tasks)
    with tqdm(total=rows, desc="prepare", unit="row", disable=not rows) as bar:
        if executor is None:
            for task in tasks:
                bar.update(_write_one(task))
            return
        with executor() as pool:
            futures = [pool.submit(_write_one, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    bar.update(future.result())
            except BaseException:
                for future in futures:
                    future.cancel()
                raise


def _write_one(task: _Task) -> int:
    """Write a shard and, when it is on disk, its record; the number of rows dealt with."""
    rows = task.layout.rows(task.source, start=task.start, stop=task.stop)
    record = write_shard(task.path, rows, first_row=task.start)
    write_text(task.record_path, json.dumps(asdict(record)))
    return task.stop - task.start


def _finish(out: Path, rows: dict[str, int], tasks: Sequence[_Task], settings: dict[str, Any]) -> None:
    """Indexes, rejected rows and last the manifest, from the shards' records."""
    sources = {}
    for source, num_rows in rows.items():
        own = [task for task in tasks if task.source == source]
        records = [_read_record(task.record_path) for task in own]
        num_rejected = sum(len(record.rejected) for record in records)
        _write_rejected(out / source / REJECTED_FILE, records)
        index = write_index(out / source, (record.samples for record in records))
        shards = tuple(
            Shard(
                name=task.path.name,
                num_samples=record.num_samples,
                size_bytes=record.size_bytes,
                sha256=record.sha256,
            )
            for task, record in zip(own, records, strict=True)
        )
        sources[source] = Source(
            num_rows=num_rows,
            num_rejected=num_rejected,
            shards=shards,
            index=index,
            most_negatives=max(record.most_negatives for record in records),
            num_regions=sum(record.num_regions for record in records),
            num_left_out=sum(len(record.left_out) for record in records),
        )
        assert sources[source].num_samples + num_rejected == num_rows, f"{source}: a row is neither"
    write_manifest(out, Manifest(sources=sources, settings=settings))


def _read_record(path: Path) -> ShardRecord:
    values = json.loads(path.read_text())
    return ShardRecord(**values)


def _write_rejected(path: Path, records: Iterable[ShardRecord]) -> None:
    entries = [
        {"row": row, "reason": reason}
        for record in records
        for row, reason in sorted((*record.rejected, *record.left_out), key=lambda entry: entry[0])
    ]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    # half a surrogate pair in a path or a name of the source cannot be written as it is
    write_text(path, text.encode(errors="backslashreplace").decode())
