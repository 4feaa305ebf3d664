"""`python launcher/embed.py MODEL INPUT OUT`: vectors of a corpus for search, or a teacher's of shards."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from agff.embedder import Embedder
from agff.errors import ConfigError
from data_pipeline.corpora.corpus import Corpus
from data_pipeline.corpora.images import ImageFolder
from data_pipeline.corpora.pairs import SIDES
from launcher.command_line import exit_code_of
from launcher.embedding.corpus_vectors import HowToEncode, describe, write_corpus_vectors
from launcher.embedding.inputs import NAMES, OPTIONS, Kind, kind_of, open_corpus
from launcher.embedding.teacher import open_embedder
from launcher.embedding.teacher_vectors import open_teacher_work, write_teacher_vectors
from launcher.embedding.vectors_folder import DTYPES, REJECTED_FILE, Description
from launcher.run.meeting import from_first_rank, leave, meet, together
from launcher.run.ranks import RankInfo, rank_from_environment
from launcher.run.trained_model import load_together

ABOUT = """\
Write the vectors of everything in INPUT. What INPUT is, is recognised:

a folder of images    every image below it
FILE.jsonl, .json     rows {"id", "text", "image"}: any of them may be absent, but not text and image both
FILE.parquet          the same as columns; an image is a path, or {bytes, path}; or MMEB-train's columns:
                      then each distinct query and target
SHARDS --all_vectors  folder or URL of shards: the query and the target of each sample
SHARDS                a teacher's vectors instead, for objective: distillation (below)

MODEL is a release or run of ours. OUT gets vectors.npy, (N, M, D), the global vector and the fine ones;
items.jsonl, what each row is; rejected.jsonl, items that cannot be used, with their reasons; vectors.json,
whose vectors these are. launcher/search.py searches them.

For distillation: OUT/<SOURCE>.npy, (samples, 2, E) float16, the teacher's vector of the query and the target
of every sample, and vectors.json, which binds them to these shards; train with --data.vectors OUT. MODEL is a
release or run of ours (its global vectors), or for texts any sentence-transformers folder: Transformer,
Pooling (mean, cls, lasttoken, max), perhaps Normalize, in safetensors. sentence-transformers itself is not
needed, and no code of the folder is run.

On several GPUs or machines: `torchrun --nproc-per-node 8 launcher/embed.py ...`, `deepspeed launcher/embed.py
...` or `srun python launcher/embed.py ...`; OUT must be seen by all. The work is cut into fixed blocks, so
the vectors do not depend on the number of ranks. After a kill the same command continues. One command writes
OUT at a time: a second one waits for the first.

  python launcher/embed.py releases/quickstart photos vectors/photos
  python launcher/embed.py .cache/quickstart/teacher .cache/quickstart/shards vectors --sources Texts
"""
MOST_SHOWN = 5
_OPTIONS_OF_SOME = ("all_vectors", "sources", "sides", "images", "dtype")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, of torch's new names
    arguments = parser().parse_args(argv)
    return exit_code_of(lambda: _embed(arguments))


def _embed(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch_size {arguments.batch_size} must be >= 1")
    if arguments.num_workers < 0:
        raise ConfigError(f"--num_workers {arguments.num_workers} must be >= 0")
    rank = rank_from_environment(os.environ)
    embed_on_this_rank(arguments, rank, meet(rank))
    leave()
    return 0


def embed_on_this_rank(arguments: argparse.Namespace, rank: RankInfo, device: torch.device) -> None:
    """Write this rank's blocks; rank 0 makes files of all. Collective. Raises AgffError on all ranks."""
    kind = from_first_rank(lambda: _kind(arguments))
    if kind == "shards" and not arguments.all_vectors:
        _embed_for_distillation(arguments, rank, device)
    else:
        _embed_corpus(arguments, rank, device, kind)


def _kind(arguments: argparse.Namespace) -> Kind:
    """Of the input. Raises ConfigError, also for an option that is not for it."""
    kind = kind_of(arguments.input)
    takes = OPTIONS[kind]
    if kind == "shards" and not arguments.all_vectors:
        takes = ("sources",)
    given = [name for name in _OPTIONS_OF_SOME if getattr(arguments, name) not in (None, False)]
    if wrong := [name for name in given if name not in takes]:
        without = " without --all_vectors" * (kind == "shards" and "all_vectors" not in given)
        raise ConfigError(
            f"--{wrong[0]} is not for a {NAMES[kind]}{without}, which {arguments.input} is; it takes "
            f"{', '.join(f'--{name}' for name in takes)}"
        )
    return kind


def _embed_for_distillation(arguments: argparse.Namespace, rank: RankInfo, device: torch.device) -> None:
    work = together(lambda: open_teacher_work(arguments.model, arguments.input, arguments.sources, device))
    _say(rank, _table(work.plan(), arguments, rank))
    if arguments.dry_run:
        return
    left_out = write_teacher_vectors(work, arguments.out, rank, batch_size=arguments.batch_size)
    lines = [f"written: {arguments.out}; train with --data.vectors {arguments.out}"]
    if unusable := left_out.unusable:
        lines.append(
            f"{len(unusable)} samples or sides cannot be used, and have zeros (training skips them):"
        )
        lines += [f"  {line}" for line in unusable[:MOST_SHOWN]]
        if len(unusable) > MOST_SHOWN:
            lines.append(f"  and {len(unusable) - MOST_SHOWN} more; launcher/verify.py --deep lists them")
    _say(rank, "\n".join([*lines, *_cut(left_out.num_cut, "sides")]))


def _embed_corpus(arguments: argparse.Namespace, rank: RankInfo, device: torch.device, kind: Kind) -> None:
    how = HowToEncode(
        batch_size=arguments.batch_size,
        dtype=arguments.dtype or DTYPES[0],
        num_workers=arguments.num_workers,
    )

    def open_input() -> Corpus:
        return open_corpus(
            arguments.input, images=arguments.images, sides=arguments.sides, sources=arguments.sources
        )

    corpus = from_first_rank(open_input)
    embedder = load_together(lambda: open_embedder(arguments.model, device))
    description = from_first_rank(
        lambda: describe(embedder, corpus, how, model=arguments.model, location=arguments.input)
    )
    _say(rank, _table(_plan(corpus, embedder, description, kind), arguments, rank))
    if arguments.dry_run:
        return
    done = write_corpus_vectors(embedder, corpus, arguments.out, description, how, rank, title="embed")
    lines = [f"written: {arguments.out}: {done.num_items:,} items"]
    if done.num_rejected:
        path = arguments.out / REJECTED_FILE
        lines.append(f"{done.num_rejected:,} items cannot be used and have no vector: {path} has the reasons")
    _say(rank, "\n".join([*lines, *_cut(done.num_cut, "items")]))


def _plan(corpus: Corpus, embedder: Embedder, description: Description, kind: Kind) -> dict[str, str]:
    shape = (corpus.num_items, description.num_vectors, description.dim)
    size = shape[0] * shape[1] * shape[2] * int(description.dtype[-2:]) / 8 / 2**20
    others, links = (corpus.num_others, corpus.num_links) if isinstance(corpus, ImageFolder) else (0, 0)
    return {
        "model": f"{embedder.processor.family.name}, weights sha256 {description.weights_sha256[:12]}...",
        "input": f"{NAMES[kind]}, {corpus.num_items:,} items"
        + (f"; {others:,} other files there have no image's name" if others else "")
        + (f"; {links:,} links to folders there are not followed" if links else ""),
        "vectors": f"{shape} {description.dtype}, {size:,.1f} MiB, and as much again while they are written",
    }


def _table(rows: Mapping[str, str], arguments: argparse.Namespace, rank: RankInfo) -> str:
    rows = {**rows, "ranks": f"{rank.world_size}", "out": str(arguments.out)}
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def _cut(count: int, what: str) -> list[str]:
    """What to say of texts that are too long."""
    return [f"{count:,} {what} have a text whose end the model does not read: it is too long"] * (count > 0)


def _say(rank: RankInfo, text: str) -> None:
    if rank.rank == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="embed", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", type=Path, help="release, run or (for distillation) sentence-transformers")
    made.add_argument("input", help="folder of images, JSON or parquet file, shards or their URL")
    made.add_argument("out", type=Path, help="folder to write; a begun one is continued")
    made.add_argument(
        "--all_vectors", action="store_true", help="of shards all vectors of the items, not a teacher's"
    )
    made.add_argument(
        "--sources", nargs="+", metavar="SOURCE", help="of shards the sources to embed (default: all)"
    )
    made.add_argument(
        "--sides", nargs="+", choices=SIDES, help="of shards and MMEB-train's parquet (default: both)"
    )
    made.add_argument(
        "--images", type=Path, help="folder of a table's images (default: the table's; MMEB-train's: above)"
    )
    made.add_argument("--dtype", choices=DTYPES, help=f"number format of all vectors (default: {DTYPES[0]})")
    made.add_argument(
        "--batch_size", type=int, default=32, help="items encoded at once (default: %(default)s)"
    )
    made.add_argument(
        "--num_workers",
        type=int,
        default=2,
        help="of all vectors: processes of a rank that load items while the model computes "
        "(default: %(default)s)",
    )
    made.add_argument(
        "--dry-run", action="store_true", help="load the model, say what would be written, and stop"
    )
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    return made


if __name__ == "__main__":
    raise SystemExit(main())
