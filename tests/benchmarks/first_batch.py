"""`python -m tests.benchmarks.first_batch`: seconds until a run that resumes at step S has its first batch.

The set is large in all but bytes: --shards names in --sources sources are hard links to a few real tar files,
with a real index and manifest. Opening, planning, reading, decoding and encoding are those of a training run;
one worker process.

open:    read_manifest, Plan and ShardReader. batch: from there until the batch is in this process.
process: the same in a process of its own; `imports` stands apart, since every program that uses torch pays
it.
replay:  what a loader without a seek does: plain webdataset, undecoded, over the rank's share of the shards,
         until the samples of S steps are passed, then one batch decoded and encoded. Measured up to
         --replay_limit, beyond that extrapolated from the longest measured one and marked as such.

All files are in the page cache.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

PROGRAM_START = time.perf_counter()

import numpy as np  # noqa: E402
import webdataset  # noqa: E402
from PIL import Image  # noqa: E402

from agff.batch import Item  # noqa: E402
from agff.processor import ItemProcessor, ProcessorConfig  # noqa: E402
from agff.prompts import PromptConfig  # noqa: E402
from data_pipeline.collate import FixedRows  # noqa: E402
from data_pipeline.convert import prepare  # noqa: E402
from data_pipeline.loader import StepBatches, load_batches  # noqa: E402
from data_pipeline.manifest import (  # noqa: E402
    Manifest,
    Shard,
    Source,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)
from data_pipeline.plan import Mixture, Plan  # noqa: E402
from data_pipeline.reader import ShardReader  # noqa: E402
from data_pipeline.storage import LocalFolder  # noqa: E402
from launcher.quickstart.layouts import (  # noqa: E402
    TrainRow,
    image_query,
    train_image_path,
    write_train_subset,
)
from tests.drawings import tiny_backbone  # noqa: E402

SUBSET = "Real"


def make_large_set(folder: Path, arguments: argparse.Namespace) -> None:
    """`folder`/shards of --shards hard links to --files tar files that `prepare` wrote, and
    `folder`/backbone."""
    mmeb, real = folder / "mmeb", folder / "real"
    generator = np.random.default_rng(0)
    rows = []
    for number in range(arguments.files * arguments.samples):
        path = train_image_path(SUBSET, f"{number:06d}.jpg")
        (mmeb / path).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, size=(8, 8, 3), dtype=np.uint8))
        coarse.resize((64, 64)).save(mmeb / path, "JPEG")
        rows.append(TrainRow(qry=image_query("Name it."), qry_image_path=path, pos_text=f"picture {number}"))
    write_train_subset(mmeb, SUBSET, rows, with_negatives=False)
    source = prepare(mmeb, real, rows_per_shard=arguments.samples).sources[SUBSET]
    index = _index_of(real, source).reshape(arguments.files, arguments.samples, 2).tolist()
    sources = {}
    per_source = arguments.shards // arguments.sources
    for number in range(arguments.sources):
        name = f"source_{number:02d}"
        (folder / "shards" / name).mkdir(parents=True)
        shards = []
        for at in range(per_source):
            of = source.shards[at % arguments.files]
            shard = Shard(
                name=f"{name}-{at:05d}.tar",
                num_samples=of.num_samples,
                size_bytes=of.size_bytes,
                sha256=of.sha256,
            )
            os.link(real / SUBSET / of.name, folder / "shards" / name / shard.name)
            shards.append(shard)
        file = write_index(
            folder / "shards" / name, (index[at % arguments.files] for at in range(per_source))
        )
        num_rows = per_source * arguments.samples
        sources[name] = Source(num_rows=num_rows, num_rejected=0, shards=tuple(shards), index=file)
    write_manifest(folder / "shards", Manifest(sources=sources, settings={}))
    tiny_backbone(folder / "backbone")


def _index_of(real: Path, source: Source) -> np.ndarray[Any, Any]:
    table = read_index(LocalFolder(real), SUBSET, source)
    return np.stack([table.column(name).to_numpy() for name in ("offset", "size")], axis=1)


def processor_of(folder: Path) -> ItemProcessor:
    """The tiny backbone's."""
    return ItemProcessor.from_folder(folder / "backbone", prompts=PromptConfig(), limits=ProcessorConfig())


def ours(
    folder: Path, processor: ItemProcessor, step: int, arguments: argparse.Namespace
) -> tuple[float, float]:
    """(seconds to open, seconds to the batch) of a run that begins at `step`."""
    start = time.perf_counter()
    shards = LocalFolder(folder / "shards")
    manifest = read_manifest(shards)
    mixture = Mixture(sub_batch_size=arguments.local_batch)
    size = arguments.local_batch * arguments.ranks
    batches = StepBatches(
        plan=Plan(manifest, mixture, seed=0, global_batch_size=size),
        reader=ShardReader(shards, manifest),
        process=processor,
        rank=arguments.ranks // 3,
        world_size=arguments.ranks,
        chunking=FixedRows(rows=arguments.local_batch),
        max_bad_in_a_row=0,
    )
    opened = time.perf_counter()
    with_batch = load_batches(batches, start_step=step, num_steps=step + 1, num_workers=1)
    batch = next(with_batch)
    arrived = time.perf_counter()
    if batch.num_pairs != arguments.local_batch or any(with_batch):
        raise RuntimeError("not the one batch that was asked for")
    return opened - start, arrived - opened


def ours_apart(folder: Path, step: int, arguments: argparse.Namespace) -> dict[str, float]:
    """{"imports", "processor", "open", "batch", "all"}: seconds, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.first_batch",
        "--child",
        str(folder),
        "--steps",
        str(step),
    ]
    command += ["--local_batch", str(arguments.local_batch), "--ranks", str(arguments.ranks)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "all": time.perf_counter() - start}


def replay(folder: Path, processor: ItemProcessor, step: int, arguments: argparse.Namespace) -> float:
    """Seconds until webdataset has passed the samples of `step` steps of one rank and made its next batch."""
    start = time.perf_counter()
    shards = sorted(str(path) for path in (folder / "shards").glob("*/*.tar"))
    own = shards[arguments.ranks // 3 :: arguments.ranks]
    samples = iter(webdataset.WebDataset(own, shardshuffle=False, nodesplitter=None).repeat())
    rest = islice(samples, step * arguments.local_batch, None)
    items = list(_decoded(islice(rest, arguments.local_batch)))
    processor([query for query, _ in items])
    processor([target for _, target in items])
    return time.perf_counter() - start


def _decoded(samples: Iterator[dict[str, Any]]) -> Iterator[tuple[Item, Item]]:
    for sample in samples:
        record = json.loads(sample["json"])
        image = Image.open(io.BytesIO(sample["query.jpg"])).convert("RGB")
        yield Item(text=record["query"]["text"], image=image), Item(text=record["target"]["text"])


def _child(arguments: argparse.Namespace) -> int:
    imported = time.perf_counter()
    processor = processor_of(arguments.child)
    made = time.perf_counter()
    opened, batch = ours(arguments.child, processor, arguments.steps[0], arguments)
    times = {
        "imports": imported - PROGRAM_START,
        "processor": made - imported,
        "open": opened,
        "batch": batch,
    }
    sys.stdout.write(json.dumps(times) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[10, 1000, 100_000], help="S, one table row each"
    )
    parser.add_argument("--files", type=int, default=20, help="real tar files (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=500, help="samples of one tar file (default: %(default)s)"
    )
    parser.add_argument(
        "--shards", type=int, default=10_000, help="names that link to them (default: %(default)s)"
    )
    parser.add_argument("--sources", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument(
        "--local_batch", type=int, default=64, help="pairs of one rank (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timed runs, three times as many in this process (default: %(default)s)",
    )
    parser.add_argument(
        "--replay_limit", type=int, default=1000, help="largest S that is replayed (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        return _child(arguments)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        make_large_set(folder, arguments)
        _report(folder, arguments)
    finally:
        shutil.rmtree(folder)
    return 0


def _report(folder: Path, arguments: argparse.Namespace) -> None:
    processor = processor_of(folder)
    for path in (folder / "real" / SUBSET).glob("*.tar"):
        path.read_bytes()  # into the page cache
    ours(folder, processor, 0, arguments)
    runs: dict[int, list[tuple[float, float]]] = {step: [] for step in arguments.steps}
    apart: dict[int, list[dict[str, float]]] = {step: [] for step in arguments.steps}
    replays: dict[int, list[float]] = {step: [] for step in arguments.steps if step <= arguments.replay_limit}
    for _ in range(arguments.repeats):  # in turns, so that what else the machine does meets all alike
        for step in arguments.steps:
            runs[step] += [ours(folder, processor, step, arguments) for _ in range(3)]
            apart[step].append(ours_apart(folder, step, arguments))
            if step in replays:
                replays[step].append(replay(folder, processor, step, arguments))
    sys.stdout.write(
        f"{platform.machine()}, {os.cpu_count()} CPUs; {arguments.shards:,} shards, "
        f"{arguments.shards * arguments.samples:,} samples, {arguments.sources} sources, rank "
        f"{arguments.ranks // 3} of {arguments.ranks:,}, {arguments.local_batch} pairs a rank; seconds, "
        f"medians of {arguments.repeats} runs\n          this process               a process of its own\n"
        "     step     open    batch      sum  imports  processor     open    batch   all    replay\n"
    )
    replayed = {step: float(np.median(times)) for step, times in replays.items()}
    for step in arguments.steps:
        opened, batch = (float(np.median([run[part] for run in runs[step]])) for part in (0, 1))
        own = {name: float(np.median([times[name] for times in apart[step]])) for name in apart[step][0]}
        longest = max(replayed, default=0)
        if step in replayed:
            text = f"{replayed[step]:>9.2f}"
        else:
            text = (
                f"{replayed[longest] * step / longest:>9.0f} (extrapolated from {longest:,})"
                if longest
                else "-"
            )
        sys.stdout.write(
            f"{step:>9,} {opened:>8.3f} {batch:>8.3f} {opened + batch:>8.3f} "
            f"{own['imports']:>8.2f} {own['processor']:>10.2f} {own['open']:>8.3f} {own['batch']:>8.3f} "
            f"{own['all']:>5.1f} {text}\n"
        )
    sums = [float(np.median([sum(run) for run in runs[step]])) for step in arguments.steps]
    sys.stdout.write(
        f"step {arguments.steps[-1]:,} takes {sums[-1] / sums[0]:.2f} times what step {arguments.steps[0]:,} "
        "takes\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
