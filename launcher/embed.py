"""`python launcher/embed.py MODEL SHARDS OUT`: a teacher's vectors for every sample of the shards."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from agff.collectives import gather_objects, raise_together
from agff.errors import AgffError, ConfigError, StorageError
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.remote import CacheConfig, open_folder
from data_pipeline.vectors import SIDES
from data_pipeline.vectors_writer import VectorsWriter
from launcher.command_line import report
from launcher.embedding.blocks import refuse_images, write_blocks
from launcher.embedding.teacher import Teacher, open_teacher
from launcher.run.ranks import RankInfo, export, rank_from_environment

ABOUT = """\
Write a teacher's vectors of the query and the target of every sample, for objective: distillation.

MODEL   a release or run of ours (its global vectors; texts and images), or any sentence-transformers folder
        (texts alone): Transformer, Pooling (mean, cls, lasttoken, max), perhaps Normalize, in safetensors.
        sentence-transformers itself is not needed, and no code of the folder is run.
SHARDS  folder written by launcher/prepare.py, or its URL.
OUT     OUT/<SOURCE>.npy, (samples, 2, E) float16, and vectors.json, which binds them to these shards.
        Train with --data.vectors OUT.

On several GPUs or machines: `torchrun --nproc-per-node 8 launcher/embed.py ...`, `deepspeed launcher/embed.py
...` or `srun python launcher/embed.py ...`; OUT must be seen by all. The work is cut into fixed blocks of
1,024 samples, so the vectors do not depend on the number of ranks. After a kill the same command continues.

  python launcher/embed.py .cache/quickstart/teacher .cache/quickstart/shards vectors --sources Texts
"""
MEETING_S = 7 * 24 * 3600
"""A rank that is done waits this long for the others."""
MOST_SHOWN = 5

Value = TypeVar("Value")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, of torch's new names
    arguments = parser().parse_args(argv)
    try:
        if arguments.batch_size < 1:
            raise ConfigError(f"--batch_size {arguments.batch_size} must be >= 1")
        rank = rank_from_environment(os.environ)
        device = _meet(rank)
        embed_on_this_rank(arguments, rank, device)
    except AgffError as error:
        return report(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _meet(rank: RankInfo) -> torch.device:
    """This rank's device. Collective."""
    if rank.world_size == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from agff.engine import start_process_group

    export(rank, os.environ)
    return start_process_group(rank.local_rank, timeout_s=MEETING_S)


def embed_on_this_rank(arguments: argparse.Namespace, rank: RankInfo, device: torch.device) -> None:
    """Write this rank's blocks; rank 0 makes files of all. Collective. Raises AgffError on all ranks."""

    def prepare() -> tuple[ShardReader, Teacher, Manifest, list[str]]:
        folder = open_folder(arguments.shards, CacheConfig())
        manifest = read_manifest(folder)
        sources, reader = _sources(arguments.sources, manifest), ShardReader(folder, manifest)
        teacher = open_teacher(arguments.model, device)
        refuse_images(teacher, reader, sources)
        return reader, teacher, manifest, sources

    reader, teacher, manifest, sources = _together(prepare)
    if rank.rank == 0:
        _say(_plan(arguments, manifest, sources, teacher, rank.world_size))
    if arguments.dry_run:
        return

    def work() -> tuple[VectorsWriter, list[str]]:
        writer = VectorsWriter(
            arguments.out, manifest, model=teacher.identity, dim=teacher.dim, sources=sources
        )
        blocks = writer.missing_blocks(rank=rank.rank, world_size=rank.world_size)
        num_samples = sum(block.stop - block.start for block in blocks)
        with tqdm(total=num_samples, desc="embed", unit="sample", disable=rank.rank > 0) as bar:
            return writer, write_blocks(
                teacher, reader, writer, blocks, batch_size=arguments.batch_size, progress=bar.update
            )

    writer, own_unusable = _together(work)
    unusable = [line for lines in gather_objects(own_unusable) for line in lines]

    def finish() -> None:
        if rank.rank == 0:
            writer.finish()

    _together(finish)
    if rank.rank == 0:
        _say(_outcome(arguments.out, unusable))


def _together(work: Callable[[], Value]) -> Value:
    """What it returns; the error of any rank is raised by all. Collective."""
    error: AgffError | None = None
    try:
        value = work()
    except AgffError as caught:
        error = caught
    except OSError as caught:
        error = StorageError(f"the vectors cannot be written: {caught}")
    raise_together(error)
    return value


def _sources(wanted: Sequence[str] | None, manifest: Manifest) -> list[str]:
    if wanted is None:
        return sorted(manifest.sources)
    if unknown := sorted(set(wanted) - manifest.sources.keys()):
        raise ConfigError(
            f"--sources {' '.join(unknown)}: the shards have no such source; they have "
            f"{', '.join(sorted(manifest.sources))}"
        )
    return sorted(set(wanted))


def _plan(
    arguments: argparse.Namespace,
    manifest: Manifest,
    sources: Sequence[str],
    teacher: Teacher,
    world_size: int,
) -> str:
    counts = {name: manifest.sources[name].num_samples for name in sources}
    size = sum(counts.values()) * SIDES * teacher.dim * 2
    rows = {
        "teacher": teacher.identity,
        "sees": "texts alone" if teacher.seen_pixels is None else "texts and images",
        "vectors": f"E = {teacher.dim:,}; query and target of each sample, float16, {size / 2**20:,.1f} MiB",
        "ranks": f"{world_size}",
        **{name: f"{count:,} samples" for name, count in counts.items()},
        "out": str(arguments.out),
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def _outcome(out: Path, unusable: Sequence[str]) -> str:
    lines = [f"written: {out}; train with --data.vectors {out}"]
    if unusable:
        lines.append(
            f"{len(unusable)} samples or sides cannot be used, and have zeros (training skips them):"
        )
        lines += [f"  {line}" for line in unusable[:MOST_SHOWN]]
        if len(unusable) > MOST_SHOWN:
            lines.append(f"  and {len(unusable) - MOST_SHOWN} more; launcher/verify.py --deep lists them")
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="embed", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", type=Path, help="release, run or sentence-transformers folder")
    made.add_argument("shards", help="folder of shards, or its URL")
    made.add_argument("out", type=Path, help="folder to write; a begun one is continued")
    made.add_argument(
        "--sources", nargs="+", metavar="SOURCE", help="the sources to embed (default: all of the shards)"
    )
    made.add_argument(
        "--batch_size", type=int, default=32, help="items encoded at once (default: %(default)s)"
    )
    made.add_argument(
        "--dry-run", action="store_true", help="load the teacher, say what would be written, and stop"
    )
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    return made


if __name__ == "__main__":
    raise SystemExit(main())
