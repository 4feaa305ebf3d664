"""`python launcher/verify.py SHARDS`: is every shard, index and sample as it was written? Or an MMEB download
complete?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from agff.errors import AgffError, ConfigError
from data_pipeline.layouts.mmeb_train import SPLITS
from data_pipeline.manifest import MANIFEST_FILE, read_manifest
from data_pipeline.storage import LocalFolder
from data_pipeline.verify import check_folder, repair_indexes
from data_pipeline.verify_download import check_download
from launcher.command_line import report

ABOUT = """\
Check a folder of shards, or an MMEB-train download before it is converted; what is in the folder decides.

Shards: presence, size and SHA-256 of every file, counts, keys, and whether the index points at the samples.
Of a changed shard each changed sample is named. --deep decodes every image as well.
Download: the parts of each subset, columns, rows that cannot be used, and each image that a row names and
that is missing or, by its header and end, no whole image. --deep decodes them.

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
            return _report(_check_download(arguments))
        folder = LocalFolder(arguments.folder)
        manifest = read_manifest(folder)
        if arguments.repair_index:
            manifest, repaired = repair_indexes(folder, manifest)
            for name in repaired:
                num_samples = manifest.sources[name].num_samples
                sys.stdout.write(f"{name}: index written, {num_samples:,} samples\n")
        return _report(check_folder(folder, manifest, deep=arguments.deep, processes=arguments.processes))
    except AgffError as error:
        return report(error)


def _check_download(arguments: argparse.Namespace) -> list[str]:
    results, problems = check_download(
        arguments.folder, split=arguments.split, deep=arguments.deep, processes=arguments.processes
    )
    sys.stdout.write(f"{'subset':<28} {'rows':>9} {'images':>9} {'findings':>9}\n")
    for name, result in results.items():
        sys.stdout.write(
            f"{name:<28} {result.num_rows:>9,} {result.num_images:>9,} {len(result.problems):>9,}\n"
        )
    return problems + [problem for result in results.values() for problem in result.problems]


def _report(problems: Iterable[str]) -> int:
    found = list(problems)
    for problem in found:
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{len(found)} finding{'s' * (len(found) > 1)}\n" if found else "all is well\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
