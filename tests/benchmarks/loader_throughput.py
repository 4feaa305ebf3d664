"""`python -m tests.benchmarks.loader_throughput`: images/s of the loader, beside the decode limit of its
worker processes.

A pair is an image with a question, and a text. All methods read the same JPEGs and make the same chunks of
model inputs with the same processor, in the same number of processes:

bare loop:   the limit: each process reads files, decodes them with PIL and calls the processor; nothing
leaves it.
ours:        data_pipeline.loader.load_batches over shards; whole batches arrive in this process.
webdataset:  WebDataset over the same shards, decode("pil"), the same chunks, torch's DataLoader; no
shuffling. loose files: a torch Dataset of image files in random order, one batch an index, torch's
DataLoader.

The clock starts when each process has delivered WARM_UP batches and stops --pairs later, while more are being
made, so that neither start-up nor an empty or full queue counts. Runs take turns; the best of --repeats
counts. Beside it stands the processor time that an image took in the worker processes and in this one, which
other programs on the machine hardly change. Files are in the page cache. --draft lets ours decode large JPEGs
at a fraction of their size, as a training run does; by default it does not, so that all methods decode alike.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from agff.batch import Item, ModelInputs
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.collate import Chunking, FixedRows, TokenBudget
from data_pipeline.convert import prepare
from data_pipeline.loader import StepBatches, load_batches
from data_pipeline.manifest import read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from launcher.quickstart.layouts import TrainRow, image_query, train_image_path, write_train_subset
from tests.benchmarks.table import Row
from tests.benchmarks.turns import Ratio
from tests.drawings import tiny_backbone

SUBSET = "Pictures"
WARM_UP = 4
QUESTION = image_query("What is to be seen here?")
Encoded = tuple[ModelInputs, ModelInputs]


def answer(number: int) -> str:
    """The text target of an image."""
    return f"picture {number}, made for a measurement"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What every method reads, and how much of it."""

    mmeb: Path
    shards: Path
    paths: tuple[str, ...]
    processor: ItemProcessor
    batch: int
    num_batches: int
    chunking: Chunking
    draft: bool

    def encode(self, pairs: Sequence[tuple[Item, Item]]) -> Encoded:
        """Model inputs of a batch: one chunk of queries, one of targets."""
        return self.processor([query for query, _ in pairs]), self.processor([target for _, target in pairs])

    def load(self, number: int) -> tuple[Item, Item]:
        """Pair from a loose file."""
        content = (self.mmeb / self.paths[number]).read_bytes()
        return Item(text=QUESTION, image=_decode(content)), Item(text=answer(number))


def _decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def make_pairs(folder: Path, arguments: argparse.Namespace) -> Pairs:
    """Seeded JPEGs of 320 x 240 to 512 x 384 pixels with the spectrum of a photograph, loose and in
    shards."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(arguments.images):
        width = int(generator.integers(320, 513))
        height = width * 3 // 4
        pixels = np.zeros((height, width, 3))
        for cells in (4, 16, 64, 256):  # coarse to fine, ever weaker
            noise = Image.fromarray(generator.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8))
            pixels += (
                np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / cells**0.5
            )
        pixels *= 255 / pixels.max()
        path = train_image_path(SUBSET, f"{number:06d}.jpg")
        (folder / "mmeb" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "mmeb" / path, "JPEG", quality=90)
        rows.append(TrainRow(qry=QUESTION, qry_image_path=path, pos_text=answer(number)))
    write_train_subset(folder / "mmeb", SUBSET, rows, with_negatives=False)
    prepare(folder / "mmeb", folder / "shards", rows_per_shard=arguments.images // 8)
    limits = ProcessorConfig(max_pixels=arguments.max_pixels)
    return Pairs(
        mmeb=folder / "mmeb",
        shards=folder / "shards",
        paths=tuple(row.qry_image_path for row in rows),
        processor=ItemProcessor.from_folder(
            tiny_backbone(folder / "backbone"), prompts=PromptConfig(), limits=limits
        ),
        batch=arguments.batch,
        num_batches=arguments.pairs // arguments.batch,
        chunking=TokenBudget(max_tokens=arguments.max_tokens)
        if arguments.max_tokens
        else FixedRows(rows=arguments.batch),
        draft=arguments.draft,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of a method cost."""

    images_per_s: float
    worker_ms: float
    """Processor time of an image in its worker process."""
    main_ms: float
    """The same in this process."""


def run_of(arrivals: Iterator[Any], pairs: Pairs, workers: int) -> Run:
    """Costs between the warm-up and the batch that comes `num_batches` later; more must follow."""
    for _ in range(WARM_UP * workers):
        next(arrivals)
    pids = [process.pid for process in multiprocessing.active_children()]
    workers_before, main_before = sum(map(_processor_time, pids)), time.process_time()
    start = time.perf_counter()
    for _ in range(pairs.num_batches):
        next(arrivals)
    seconds, images = time.perf_counter() - start, pairs.num_batches * pairs.batch
    return Run(
        images_per_s=images / seconds,
        worker_ms=1e3 * (sum(map(_processor_time, pids)) - workers_before) / images,
        main_ms=1e3 * (time.process_time() - main_before) / images,
    )


def _processor_time(pid: int | None) -> float:
    """Seconds, user and system, of a process that runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def total_batches(pairs: Pairs, workers: int) -> int:
    """To be made in all, so that no worker is idle before the clock stops."""
    return pairs.num_batches + (WARM_UP + 3) * workers


def bare_loop(pairs: Pairs, workers: int) -> Run:
    """Processes that decode and encode and send nothing but their times."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(workers), context.SimpleQueue()
    running = [
        context.Process(target=_bare_process, args=(pairs, worker, workers, barrier, results))
        for worker in range(workers)
    ]
    for process in running:
        process.start()
    found: list[Run] = [results.get() for _ in running]
    for process in running:
        process.join()
    return Run(
        images_per_s=sum(run.images_per_s for run in found),
        worker_ms=sum(run.worker_ms for run in found) / workers,
        main_ms=0,
    )


def _bare_process(pairs: Pairs, worker: int, workers: int, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    order = _random_order(pairs, workers)
    own = [order[number] for number in range(worker, len(order), workers)]
    for numbers in own[:WARM_UP]:
        pairs.encode([pairs.load(number) for number in numbers])
    barrier.wait()
    start, own_start = time.perf_counter(), time.process_time()
    timed = own[WARM_UP : WARM_UP + pairs.num_batches // workers]
    for numbers in timed:
        pairs.encode([pairs.load(number) for number in numbers])
    seconds, own_seconds, images = (
        time.perf_counter() - start,
        time.process_time() - own_start,
        len(timed) * pairs.batch,
    )
    for numbers in own[-2:]:  # keep the core busy until the others are done too
        pairs.encode([pairs.load(number) for number in numbers])
    results.put(Run(images_per_s=images / seconds, worker_ms=1e3 * own_seconds / images, main_ms=0))


def _random_order(pairs: Pairs, workers: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    needed = total_batches(pairs, workers) * pairs.batch
    epochs = -(-needed // len(pairs.paths))
    flat = np.concatenate([generator.permutation(len(pairs.paths)) for _ in range(epochs)])[:needed]
    return flat.reshape(-1, pairs.batch).tolist()


def our_batches(pairs: Pairs) -> StepBatches:
    """As launcher.run.data makes them."""
    folder = LocalFolder(pairs.shards)
    manifest = read_manifest(folder)
    return StepBatches(
        plan=Plan(manifest, Mixture(sub_batch_size=pairs.batch), seed=0, global_batch_size=pairs.batch),
        reader=ShardReader(folder, manifest),
        process=pairs.processor,
        rank=0,
        world_size=1,
        chunking=pairs.chunking,
        max_bad_in_a_row=0,
        seen_pixels=pairs.processor.max_image_pixels if pairs.draft else None,
    )


def ours(pairs: Pairs, workers: int) -> Run:
    """`load_batches`."""
    total = total_batches(pairs, workers)
    arrivals = load_batches(our_batches(pairs), start_step=0, num_steps=total, num_workers=workers)
    return run_of(arrivals, pairs, workers)


def from_webdataset(pairs: Pairs, workers: int) -> Run:
    """Plain webdataset."""
    shards = sorted(str(path) for path in pairs.shards.glob("*/*.tar"))
    samples = webdataset.WebDataset(shards, shardshuffle=False).repeat().decode("pil").map(_items_of_sample)
    batches = samples.batched(pairs.batch, collation_fn=pairs.encode, partial=False)
    return run_of(iter(DataLoader(batches, batch_size=None, num_workers=workers)), pairs, workers)


def _items_of_sample(sample: dict[str, Any]) -> tuple[Item, Item]:
    record = sample["json"]
    return Item(text=record["query"]["text"], image=sample["query.jpg"]), Item(text=record["target"]["text"])


@dataclass(frozen=True)
class LooseFiles(Dataset[Encoded]):
    """Batches of loose image files."""

    pairs: Pairs
    order: list[list[int]]

    def __getitem__(self, index: int) -> Encoded:
        return self.pairs.encode([self.pairs.load(number) for number in self.order[index]])

    def __len__(self) -> int:
        return len(self.order)


def from_loose_files(pairs: Pairs, workers: int) -> Run:
    """Loose files through torch."""
    files = LooseFiles(pairs, _random_order(pairs, workers))
    return run_of(iter(DataLoader(files, batch_size=None, num_workers=workers)), pairs, workers)


METHODS: dict[str, Callable[[Pairs, int], Run]] = {
    "bare loop": bare_loop,
    "ours": ours,
    "webdataset": from_webdataset,
    "loose files": from_loose_files,
}


def measure(arguments: argparse.Namespace) -> tuple[Pairs, dict[tuple[str, int], list[Run]], int]:
    """(what was read, the runs of each method and number of processes, bytes of the files); they take
    turns."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as many cores for each as processes
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        pairs = make_pairs(folder, arguments)
        for number in range(len(pairs.paths)):
            pairs.load(number)  # into the page cache
        runs: dict[tuple[str, int], list[Run]] = {}
        for _ in range(arguments.repeats):
            for workers in arguments.workers:
                for name, method in METHODS.items():
                    runs.setdefault((name, workers), []).append(method(pairs, workers))
        return pairs, runs, sum((pairs.mmeb / path).stat().st_size for path in pairs.paths)
    finally:
        shutil.rmtree(folder)


def loader_rows(*, quick: bool) -> list[Row]:
    """For `make bench`: images/s of ours beside the bare loop and plain webdataset."""
    options = "--images 24 --pairs 8 --batch 4 --repeats 2 --workers 1" if quick else ""
    arguments = parser().parse_args(options.split())
    _, runs, _ = measure(arguments)

    def speeds(name: str, workers: int) -> list[float]:
        return [run.images_per_s for run in runs[name, workers]]

    return [
        Row.of(
            Ratio.of(speeds("ours", workers), speeds(other, workers)),
            group="loader",
            what="loader",
            case=f"{workers} process{'es' * (workers > 1)}",
            against=against,
            quantity="images/s",
            note=f"ours {sorted(speeds('ours', workers))[arguments.repeats // 2]:.0f} images/s",
        )
        for other, against in (
            ("bare loop", "a loop that only decodes and encodes"),
            ("webdataset", "webdataset with torch's DataLoader"),
        )
        for workers in arguments.workers
    ]


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="processes, one table row each"
    )
    parser.add_argument(
        "--images", type=int, default=600, help="JPEG files, each of one pair (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=384, help="timed pairs of a run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a batch (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, help="ours cuts chunks by TokenBudget (default: FixedRows)")
    parser.add_argument(
        "--max_pixels", type=int, default=512 * 384, help="limit of the processor (default: %(default)s)"
    )
    parser.add_argument(
        "--draft", action="store_true", help="ours decodes large JPEGs at a fraction of their size"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    pairs, runs, file_bytes = measure(arguments)
    sys.stdout.write(
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, webdataset "
        f"{webdataset.__version__}; {len(pairs.paths)} JPEGs of {file_bytes / len(pairs.paths) / 1e3:.0f} "
        f"kB, at most {arguments.max_pixels:,} pixels seen, {pairs.num_batches} batches of {pairs.batch}; "
        f"best of {arguments.repeats}\n                              of the bare  processor time, ms/image\n"
        "processes             images/s       loop      worker          this  images/s of each run\n"
    )
    for workers in arguments.workers:
        limit = max(run.images_per_s for run in runs["bare loop", workers])
        for name in METHODS:
            found = runs[name, workers]
            best = max(run.images_per_s for run in found)
            sys.stdout.write(
                f"{workers:>9}  {name:<12}{best:>7.1f} {best / limit:>10.2f} "
                f"{min(run.worker_ms for run in found):>11.2f} {min(run.main_ms for run in found):>13.2f}  "
                f"{' '.join(f'{run.images_per_s:.0f}' for run in found)}\n"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
