"""`python launcher/verify.py SHARDS`: is every shard, index and sample as it was written? Or an MMEB download
complete?"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agff.errors import AgffError, ConfigError, DataError
from data_pipeline.manifest import (
    MANIFEST_FILE,
    Manifest,
    file_problem,
    read_manifest,
    write_index,
    write_manifest,
)
from data_pipeline.mmeb import SPLITS, count_rows, find_subsets
from data_pipeline.storage import LocalFolder
from data_pipeline.verify import check_shard, check_subset, indexed_samples, is_shard_name, scan_shard
from launcher.command_line import report

ABOUT = """\
Check a folder of shards, or an MMEB-train download before it is converted; which one it is, the folder tells.

Shards: presence, size and SHA-256 of every file, counts, keys, and whether the index points at the samples.
Of a changed shard each changed sample is named. --deep decodes every image as well. Download: columns, rows
that cannot be used, and each image that a row names and the folder lacks. --deep decodes them.

Each finding is one line. Exit code 0: all is well; 1: something is missing or damaged; 2: the check could not
be made.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="verify", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="folder written by launcher/prepare.py, or an MMEB-train download"
    )
    parser.add_argument("--deep", action="store_true", help="decode every image too")
    parser.add_argument(
        "--repair-index",
        action="store_true",
        help="write each damaged or missing index again, from undamaged shards",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default=SPLITS[0], help="which parquet files of a download are read"
    )
    parser.add_argument("--processes", type=int, help="checkers at work at once (default: one for each core)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.processes is not None and arguments.processes < 1:
            raise ConfigError(f"--processes {arguments.processes} must be >= 1")
        if not (arguments.folder / MANIFEST_FILE).exists() and any(arguments.folder.glob("*/*.parquet")):
            if arguments.repair_index:
                raise ConfigError(
                    f"{arguments.folder} is a download, it has no index to repair; convert it first"
                )
            return _say(
                _check_download(arguments.folder, arguments.split, arguments.deep, arguments.processes)
            )
        folder = LocalFolder(arguments.folder)
        manifest = read_manifest(folder)
        if arguments.repair_index:
            manifest = repair_indexes(folder, manifest)
        return _say(check_folder(folder, manifest, deep=arguments.deep, processes=arguments.processes))
    except AgffError as error:
        return report(error)


def check_folder(
    folder: LocalFolder, manifest: Manifest, *, deep: bool, processes: int | None = None
) -> list[str]:
    """Every finding about a folder of shards, in the order of its sources and shards; empty when all is
    well."""
    name_of_hash = {
        shard.sha256: f"{name}/{shard.name}"
        for name, source in manifest.sources.items()
        for shard in source.shards
    }
    checks: list[Callable[[], list[str]]] = []
    problems: list[str] = []
    for name, source in sorted(manifest.sources.items()):
        known = {shard.name for shard in source.shards}
        for path in sorted(folder.path.glob(f"{name}/*")):
            if is_shard_name(path.name) and path.name not in known:
                problems.append(
                    f"{path}: the manifest does not know this shard; remove it, or restore its manifest"
                )
        indexed: Sequence[Any] = [None] * len(source.shards)
        if problem := file_problem(folder, name, source.index, hashes=True):
            problems.append(problem)
        else:
            indexed = indexed_samples(folder, manifest, name)
        checks += [
            functools.partial(
                check_shard, folder, name, shard, indexed=samples, name_of_hash=name_of_hash, deep=deep
            )
            for shard, samples in zip(source.shards, indexed, strict=True)
        ]
    return problems + [problem for found in _in_parallel(checks, processes, "shard") for problem in found]


def repair_indexes(folder: LocalFolder, manifest: Manifest) -> Manifest:
    """Write the index of each source whose index is missing or not the manifest's. Raises DataError for
    damaged shards."""
    sources = dict(manifest.sources)
    for name, source in sorted(manifest.sources.items()):
        if file_problem(folder, name, source.index, hashes=True) is None:
            continue
        found = [
            file_problem(folder, name, shard, hashes=True)
            for shard in tqdm(source.shards, desc=name, unit="shard")
        ]
        if damaged := [problem for problem in found if problem]:
            raise DataError(f"the index of {name} can be rebuilt from undamaged shards only: {damaged[0]}")
        contents = [scan_shard(folder.local_path(name, shard)) for shard in source.shards]
        index = write_index(folder.path / name, (content.samples for content in contents))
        sources[name] = replace(source, index=index)
        sys.stdout.write(f"{name}: index written, {source.num_samples:,} samples\n")
    repaired = replace(manifest, sources=sources)
    if repaired != manifest:
        write_manifest(folder.path, repaired)
    return repaired


def _check_download(root: Path, split: str, deep: bool, processes: int | None) -> list[str]:
    subsets = find_subsets(root, split=split)
    problems, checks, names = [], [], []
    for subset in subsets:
        try:
            num_rows = count_rows(root, subset, split=split)
        except DataError as error:
            problems.append(str(error))
            continue
        names.append(subset)
        checks.append(
            functools.partial(check_subset, root, subset, split=split, num_rows=num_rows, deep=deep)
        )
    results = list(_in_parallel(checks, processes, "subset"))
    sys.stdout.write(f"{'subset':<28} {'rows':>9} {'images':>9} {'findings':>9}\n")
    for name, result in zip(names, results, strict=True):
        sys.stdout.write(
            f"{name:<28} {result.num_rows:>9,} {result.num_images:>9,} {len(result.problems):>9,}\n"
        )
    return problems + [problem for result in results for problem in result.problems]


def _in_parallel(checks: Sequence[Callable[[], Any]], processes: int | None, unit: str) -> Iterator[Any]:
    """Results in the order of the checks, with a progress bar."""
    with ProcessPoolExecutor(processes) as pool, tqdm(total=len(checks), desc="verify", unit=unit) as bar:
        futures = [pool.submit(check) for check in checks]
        for _ in as_completed(futures):
            bar.update()
        yield from (future.result() for future in futures)


def _say(problems: Iterable[str]) -> int:
    found = list(problems)
    for problem in found:
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{len(found)} findings\n" if found else "all is well\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
