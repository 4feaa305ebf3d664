"""`python launcher/prepare.py --mmeb DIR --out SHARDS`: an MMEB-train download -> WebDataset shards, index
and manifest."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agff.errors import AgffError, ConfigError, DataError
from data_pipeline.manifest import (
    MANIFEST_FILE,
    Manifest,
    Shard,
    Source,
    check_source_names,
    read_manifest,
    write_index,
    write_manifest,
)
from data_pipeline.mmeb import SPLITS, count_rows, find_subsets, parquet_files, read_pairs
from data_pipeline.shards import ShardRecord, write_shard
from data_pipeline.storage import LocalFolder, partial_path, publish
from launcher.command_line import report
from launcher.distributed import rank_from_environment

SETTINGS_FILE = "prepare.json"
RECORDS = ".records"
"""Folder, below each source, of what has been written so far; gone when the conversion is complete."""

ABOUT = """\
Convert MMEB-train (one parquet a subset, loose image files) into WebDataset shards that stream.

Each row becomes one sample: its texts and ids as JSON, its images byte for byte. Rows that cannot be used
(missing or unreadable image, placeholder missing) are listed in <SUBSET>/rejected.jsonl with their reason;
nothing is dropped silently. A run that was killed continues when the same command is given again, and the
shards are byte for byte the same.

On several nodes: mpirun -n 64 python launcher/prepare.py ...
              or srun --mpi=pmix -n 64 python launcher/prepare.py ...
One task hands out the shards, the others write them. All must see the same folders.
"""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One shard to write: the unit of work."""

    root: Path
    out: Path
    subset: str
    split: str
    index: int
    start: int
    stop: int

    @property
    def path(self) -> Path:
        return self.out / self.subset / f"{self.subset}-{self.index:05d}.tar"

    @property
    def record_path(self) -> Path:
        return self.out / self.subset / RECORDS / f"{self.index:05d}.json"


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
    """Write the shards of all (or the named) subsets of `root` and return their manifest.

    A finished conversion with the same settings returns at once. Raises DataError for an unreadable input and
    ConfigError when `out` holds another conversion, both before anything is written; and DataError when the
    disk is full or a writer
    died: the same call then continues.

    executor: makes the pool of writers, for example `lambda: ProcessPoolExecutor(8)`; None writes in this
    process.
    """
    rows = _rows_of_subsets(root, subsets, split, max_rows)
    settings = _settings(root, rows, split, rows_per_shard)
    with _write_errors(out):
        _claim(out, settings)
    tasks = [
        _Task(
            root=root,
            out=out,
            subset=subset,
            split=split,
            index=index,
            start=start,
            stop=min(start + rows_per_shard, total),
        )
        for subset, total in rows.items()
        for index, start in enumerate(range(0, total, rows_per_shard))
    ]
    if not (out / MANIFEST_FILE).exists():
        with _write_errors(out):
            _write_shards([task for task in tasks if not task.record_path.exists()], executor)
            _finish(out, rows, tasks, settings)
    for left_by_killed_writers in (*out.glob("*.partial"), *out.glob("*/*.partial")):
        left_by_killed_writers.unlink(missing_ok=True)
    for subset in rows:
        shutil.rmtree(out / subset / RECORDS, ignore_errors=True)
    return read_manifest(LocalFolder(out))


@contextlib.contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except BrokenExecutor as error:
        raise DataError(f"{out}: a writer died ({error}); give the same command again to continue") from None
    except OSError as error:
        raise DataError(
            f"cannot read or write {error.filename or out}: {error.strerror or error}; free space or mend "
            "the cause, then give the same command again: what is complete stays"
        ) from None


def _rows_of_subsets(
    root: Path, subsets: Sequence[str] | None, split: str, max_rows: int | None
) -> dict[str, int]:
    found = find_subsets(root, split=split)
    if unknown := sorted(set(subsets or ()) - set(found)):
        raise DataError(f"{root}: no subset {', '.join(unknown)}; there are {', '.join(found)}")
    try:
        check_source_names(subsets or found)
    except ValueError as error:
        raise DataError(f"{root}: {error}; rename the folder, or name the others with --subsets") from None
    counts = {subset: count_rows(root, subset, split=split) for subset in subsets or found}
    if empty := [subset for subset, count in counts.items() if count == 0]:
        raise DataError(f"{root}: subset {', '.join(empty)} has no rows; name the others with --subsets")
    return {subset: min(count, max_rows or count) for subset, count in counts.items()}


def _settings(root: Path, rows: dict[str, int], split: str, rows_per_shard: int) -> dict[str, Any]:
    """What decides the bytes of the shards, the images aside."""
    inputs = {}
    for subset in rows:
        digest = hashlib.sha256()
        for path in parquet_files(root, subset, split=split):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        inputs[subset] = {"rows": rows[subset], "sha256": digest.hexdigest()}
    return {"split": split, "rows_per_shard": rows_per_shard, "subsets": inputs}


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Mark `out` as the place of this conversion, or refuse a place that belongs to something else."""
    marker = out / SETTINGS_FILE
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
    unfinished = f"{SETTINGS_FILE}.*.partial"  # of a run that was killed at once
    if out.exists() and any(not path.match(unfinished) for path in out.iterdir()):
        raise ConfigError(
            f"{out} exists and holds no conversion ({SETTINGS_FILE} is missing); choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_text(marker, json.dumps(settings, indent=1) + "\n")


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


def _end_with_parent() -> None:
    """In a writer: a killed command must not leave writers behind, which would go on with its work and never
    end."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_one(task: _Task) -> int:
    """Write a shard and, when it is on disk, its record; the number of rows dealt with."""
    pairs = read_pairs(task.root, task.subset, split=task.split, start=task.start, stop=task.stop)
    record = write_shard(task.path, pairs, first_row=task.start)
    _write_text(task.record_path, json.dumps(asdict(record)))
    return task.stop - task.start


def _finish(out: Path, rows: dict[str, int], tasks: Sequence[_Task], settings: dict[str, Any]) -> None:
    """Indexes, rejected rows and last the manifest, from the shards' records."""
    sources = {}
    for subset, num_rows in rows.items():
        own = [task for task in tasks if task.subset == subset]
        records = [_read_record(task.record_path) for task in own]
        num_rejected = _write_rejected(out / subset / "rejected.jsonl", records)
        index = write_index(out / subset, (record.samples for record in records))
        shards = tuple(
            Shard(
                name=task.path.name,
                num_samples=record.num_samples,
                size_bytes=record.size_bytes,
                sha256=record.sha256,
            )
            for task, record in zip(own, records, strict=True)
        )
        sources[subset] = Source(num_rows=num_rows, num_rejected=num_rejected, shards=shards, index=index)
        if sources[subset].num_samples + num_rejected != num_rows:
            raise AssertionError(
                f"{subset}: {sources[subset].num_samples} + {num_rejected} rows are not {num_rows}"
            )
    write_manifest(out, Manifest(sources=sources, settings=settings))


def _read_record(path: Path) -> ShardRecord:
    values = json.loads(path.read_text())
    return ShardRecord(**values)


def _write_rejected(path: Path, records: Iterable[ShardRecord]) -> int:
    rejected = [{"row": row, "reason": reason} for record in records for row, reason in record.rejected]
    _write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected))
    return len(rejected)


def _write_text(path: Path, text: str) -> None:
    """In one piece and on disk: a kill at any moment leaves the old file or the new one."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)


def summary(manifest: Manifest, out: Path) -> str:
    """A table: rows, written, rejected, shards and size of each source."""
    lines = [f"{'source':<28} {'rows':>9} {'written':>9} {'rejected':>9} {'shards':>7} {'MB':>9}"]
    for name, source in sorted(manifest.sources.items()):
        size = sum(shard.size_bytes for shard in source.shards) / 1e6
        lines.append(
            f"{name:<28} {source.num_rows:>9,} {source.num_samples:>9,} {source.num_rejected:>9,} "
            f"{len(source.shards):>7,} {size:>9,.1f}"
        )
    if any(source.num_rejected for source in manifest.sources.values()):
        lines.append(f"rejected rows and their reasons: {out}/<source>/rejected.jsonl")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="prepare", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mmeb", type=Path, required=True, help="folder of the download: <SUBSET>/*.parquet and images/"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the shards, new or of an interrupted run"
    )
    parser.add_argument("--subsets", nargs="+", help="only these subsets (default: all)")
    parser.add_argument("--split", choices=SPLITS, default="original", help="which parquet files are read")
    parser.add_argument(
        "--rows_per_shard", type=int, default=1000, help="rows of one tar file (default: %(default)s)"
    )
    parser.add_argument("--max_rows", type=int, help="at most so many rows of each subset (default: all)")
    parser.add_argument("--processes", type=int, help="writers at work at once (default: one for each core)")
    parser.add_argument("--dry-run", action="store_true", help="count rows and shards, write nothing")
    arguments = parser.parse_args(argv)
    try:
        for name in ("rows_per_shard", "max_rows", "processes"):
            if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
                raise ConfigError(f"--{name} {getattr(arguments, name)} must be >= 1")
        if rank_from_environment(os.environ).world_size == 1:
            pool = functools.partial(ProcessPoolExecutor, arguments.processes, initializer=_end_with_parent)
            return _run(arguments, pool if arguments.processes != 1 else None)
        return _run_under_mpi(arguments)
    except AgffError as error:
        return report(error)


def _run(arguments: argparse.Namespace, executor: Callable[[], AbstractContextManager[Any]] | None) -> int:
    if arguments.dry_run:
        rows = _rows_of_subsets(arguments.mmeb, arguments.subsets, arguments.split, arguments.max_rows)
        for subset, count in rows.items():
            sys.stdout.write(
                f"{subset:<28} {count:>9,} rows {-(-count // arguments.rows_per_shard):>7,} shards\n"
            )
        return 0
    manifest = prepare(
        arguments.mmeb,
        arguments.out,
        subsets=arguments.subsets,
        split=arguments.split,
        rows_per_shard=arguments.rows_per_shard,
        max_rows=arguments.max_rows,
        executor=executor,
    )
    sys.stdout.write(summary(manifest, arguments.out) + "\n")
    return 0


def _run_under_mpi(arguments: argparse.Namespace) -> int:
    """Task 0 runs the conversion, the others write shards for it until it is done. Collective."""
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"several tasks were started, but mpi4py finds no MPI library ({error}); install one (README), "
            "or start one task"
        ) from None
    started = rank_from_environment(os.environ).world_size
    if MPI.COMM_WORLD.Get_size() != started:
        raise ConfigError(
            f"{started} tasks were started, MPI knows {MPI.COMM_WORLD.Get_size()}; use srun --mpi=pmix, or "
            "mpirun of the same MPI that mpi4py loads"
        )
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        if pool is None:
            return 0  # a writer: its work was done inside the call above
        return _run(arguments, lambda: contextlib.nullcontext(pool))


if __name__ == "__main__":
    raise SystemExit(main())
