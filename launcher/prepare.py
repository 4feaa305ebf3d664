"""`python launcher/prepare.py --mmeb DIR --out SHARDS`: training data in a public layout -> WebDataset
shards, index and manifest."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from agff.errors import AgffError, ConfigError
from data_pipeline.convert import convert, rows_of_sources
from data_pipeline.layouts.captions import Captions
from data_pipeline.layouts.image_regions import ImageRegions
from data_pipeline.layouts.layout import Layout
from data_pipeline.layouts.mmeb_train import SPLITS, MmebTrain
from data_pipeline.layouts.text_pairs import TextPairs
from data_pipeline.manifest import REJECTED_FILE, Manifest, Source
from data_pipeline.storage import SAFE_NAME
from launcher.command_line import report
from launcher.run.ranks import rank_from_environment

ABOUT = """\
Convert training data into WebDataset shards that stream. One of four layouts is named:

--mmeb DIR       MMEB-train: one parquet a subset, image files beside it
--captions DIR   images with a caption each: metadata.json as of LLaVA-CC3M-Pretrain-595K
--texts FILE     pairs of sentences, CSV or parquet: sent0, sent1, hard_neg
--regions FILE   images with regions: rows {image, regions: [{box, phrase}]} as JSON or parquet, Visual
                 Genome's region_descriptions.json, RefCOCO's refs(unc).p beside its instances.json

Each row becomes one sample: its texts and ids as JSON, its images byte for byte. Rows that cannot be used
(missing or unreadable image, placeholder missing, box outside of the image) are listed in
<SOURCE>/rejected.jsonl with their reason; nothing is dropped silently. A run that was killed continues when
the same command is given again, and the shards are byte for byte the same. One conversion writes a folder at
a time: a second one waits for the first.

Exit code 0: done; 1: done, but of some subset every row was rejected; 2: the conversion could not be made.

On several nodes: mpirun -n 64 python launcher/prepare.py ...
              or srun --mpi=pmix -n 64 python launcher/prepare.py ...
One task hands out the shards, the others write them. All must see the same folders.
"""


def _end_with_parent() -> None:
    """In a writer: a killed command must not leave writers behind, which would go on with its work and never
    end."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _summary(manifest: Manifest, out: Path) -> str:
    """A table: rows, written, rejected, shards and size of each source."""
    lines = [f"{'source':<28} {'rows':>9} {'written':>9} {'rejected':>9} {'shards':>7} {'MB':>9}"]
    for name, source in sorted(manifest.sources.items()):
        size = sum(shard.size_bytes for shard in source.shards) / 1e6
        lines.append(
            f"{name:<28} {source.num_rows:>9,} {source.num_samples:>9,} {source.num_rejected:>9,} "
            f"{len(source.shards):>7,} {size:>9,.1f}"
        )
    for name, source in sorted(manifest.sources.items()):
        if source.num_regions:
            left_out = f"{source.num_left_out:,} regions of these were left out"
            lines.append(
                f"{name}: {source.num_regions:,} regions of {source.num_samples:,} images; {left_out}"
            )
    if any(source.num_rejected or source.num_left_out for source in manifest.sources.values()):
        lines.append(f"rejected rows and their reasons: {out}/<source>/{REJECTED_FILE}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="prepare", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    layouts = parser.add_mutually_exclusive_group(required=True)
    layouts.add_argument("--mmeb", type=Path, help="folder of the download: <SUBSET>/*.parquet and images/")
    layouts.add_argument("--captions", type=Path, help="folder of metadata.json and its images")
    layouts.add_argument("--texts", type=Path, help="CSV or parquet file of pairs of sentences")
    layouts.add_argument("--regions", type=Path, help="JSON, parquet or pickle file of images with regions")
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of the images of --captions (default: DIR/images, else DIR) or --regions (default: the "
        "file's folder)",
    )
    parser.add_argument(
        "--source", help="name of the source of another layout than MMEB's (default: the folder's or file's)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the shards, new or of an interrupted run"
    )
    parser.add_argument("--subsets", nargs="+", help="only these subsets of --mmeb (default: all)")
    parser.add_argument("--split", choices=SPLITS, help="which parquet files of --mmeb (default: original)")
    parser.add_argument(
        "--rows_per_shard", type=int, default=1000, help="rows of one tar file (default: %(default)s)"
    )
    parser.add_argument("--max_rows", type=int, help="at most this many rows of each subset (default: all)")
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


def _layout(arguments: argparse.Namespace) -> Layout:
    """The named layout. Raises ConfigError for choices that another one has."""
    given = {name: getattr(arguments, name) for name in ("subsets", "split", "images", "source")}
    takes = {
        "mmeb": ("subsets", "split"),
        "captions": ("images", "source"),
        "texts": ("source",),
        "regions": ("images", "source"),
    }
    kind = next(name for name in takes if getattr(arguments, name) is not None)
    if wrong := [name for name, value in given.items() if value is not None and name not in takes[kind]]:
        raise ConfigError(f"--{wrong[0]} is not for --{kind}, which takes --{', --'.join(takes[kind])}")
    root: Path = getattr(arguments, kind)
    if kind == "mmeb":
        return MmebTrain(root=root, split=arguments.split or SPLITS[0])
    name = arguments.source or (root.resolve().name if kind == "captions" else root.stem)
    if not re.fullmatch(SAFE_NAME, name):
        raise ConfigError(
            f"{name!r} cannot name a source: letters, digits, and . _ + - inside are allowed; give --source"
        )
    if kind == "texts":
        return TextPairs(root=root, name=name)
    if kind == "regions":
        return ImageRegions(root=root, images=arguments.images or root.parent, name=name)
    images = root / "images" if (root / "images").is_dir() else root
    return Captions(root=root, images=arguments.images or images, name=name)


def _run(arguments: argparse.Namespace, executor: Callable[[], AbstractContextManager[Any]] | None) -> int:
    layout = _layout(arguments)
    if arguments.dry_run:
        rows = rows_of_sources(layout, arguments.subsets, arguments.max_rows)
        for subset, count in rows.items():
            sys.stdout.write(
                f"{subset:<28} {count:>9,} rows {-(-count // arguments.rows_per_shard):>7,} shards\n"
            )
        return 0
    manifest = convert(
        layout,
        arguments.out,
        subsets=arguments.subsets,
        rows_per_shard=arguments.rows_per_shard,
        max_rows=arguments.max_rows,
        executor=executor,
    )
    sys.stdout.write(_summary(manifest, arguments.out) + "\n")
    empty = [name for name, source in sorted(manifest.sources.items()) if source.num_samples == 0]
    for name in empty:
        sys.stderr.write(f"error: {_why_empty(name, manifest.sources[name], arguments.out)}\n")
    return 1 if empty else 0


def _why_empty(name: str, source: Source, out: Path) -> str:
    path = out / name / REJECTED_FILE
    first = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
    return (
        f"{name}: all {source.num_rows:,} rows were rejected, the first because of {first['reason']}; "
        f"fix what {path} lists and convert into another --out, or name the other subsets with --subsets"
    )


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
