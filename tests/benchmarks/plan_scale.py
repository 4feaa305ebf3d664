"""`python tests/benchmarks/plan_scale.py`: time and memory of looking up who reads what, at up to a billion
samples.

Shards are invented in memory: nothing is read or written. The lookup is `data_pipeline.plan.Plan`, of one
rank or of the whole global batch.

first:       a fresh Plan's first lookup, what resuming costs.
far apart:   one rank's rows of steps drawn at random from --span steps, so hardly any lookup finds what an
earlier one left. in a row:    one rank's rows of consecutive steps, as in training. whole batch: all ranks'
rows of one of those far apart steps.
memory:      tracemalloc, in a pass of its own: what the Plan takes when it is made, and its peak after
             --memory_steps far apart lookups, caches included; the manifest is not part of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.manifest import Manifest, Shard, Source
from data_pipeline.plan import Mixture, Plan
from data_pipeline.storage import StoredFile

SETS = ("1e6:100", "1e6:100_000", "1e8:10_000", "1e9:100_000")
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; times in milliseconds, memory in MiB."""

    manifest_s: float
    plan_ms: float
    first_ms: float
    far_ms: list[float]
    in_a_row_ms: list[float]
    whole_ms: list[float]
    made_mib: float
    peak_mib: float


def make_manifest(num_samples: int, num_shards: int, num_sources: int) -> Manifest:
    """Uneven sources (each a tenth larger than the next), shards of uneven sizes, about `num_samples` in
    all."""
    generator = np.random.default_rng(SEED)
    shares = 1.1 ** -np.arange(num_sources)
    shards_of = np.maximum(1, (shares / shares.sum() * num_shards).astype(int))
    shards_of[0] += num_shards - shards_of.sum()
    mean = num_samples / num_shards
    sources = {}
    for number, count in enumerate(shards_of):
        name = f"source_{number:02d}"
        sizes = generator.integers(max(1, int(0.8 * mean)), int(1.2 * mean) + 1, size=count)
        shards = tuple(
            Shard(
                name=f"{name}-{index:05d}.tar",
                num_samples=int(size),
                size_bytes=0,
                sha256=hashlib.sha256(f"{name} {index}".encode()).hexdigest(),
            )
            for index, size in enumerate(sizes)
        )
        index = StoredFile(name="index.arrow", size_bytes=0, sha256="00" * 32)
        sources[name] = Source(num_rows=int(sizes.sum()), num_rejected=0, shards=shards, index=index)
    return Manifest(sources=sources, settings={})


def measure(num_samples: int, num_shards: int, caps: int | None, arguments: argparse.Namespace) -> Row:
    """Everything about one set of shards."""
    start = time.perf_counter()
    manifest = make_manifest(num_samples, num_shards, arguments.sources)
    manifest_s = time.perf_counter() - start
    mixture = Mixture(caps=caps, sub_batch_size=arguments.sub_batch)

    def new_plan() -> Plan:
        return Plan(manifest, mixture, seed=SEED, global_batch_size=arguments.global_batch)

    start = time.perf_counter()
    plan = new_plan()
    plan_ms = 1e3 * (time.perf_counter() - start)
    generator = np.random.default_rng(SEED)

    def far_steps(count: int) -> list[int]:
        return [int(step) for step in generator.integers(arguments.span, size=count)]

    rank, world_size = arguments.ranks // 3, arguments.ranks
    first_ms, *far_ms = _times_ms(plan, far_steps(1 + arguments.steps), rank, world_size)
    begin = far_steps(1)[0]
    in_a_row_ms = _times_ms(plan, range(begin, begin + arguments.steps), rank, world_size)
    whole_ms = _times_ms(plan, far_steps(arguments.whole_steps), 0, 1)
    _clear_caches()
    del plan
    tracemalloc.start()
    plan = new_plan()
    made, _ = tracemalloc.get_traced_memory()
    for step in far_steps(arguments.memory_steps):
        plan.rank_rows(step, rank=rank, world_size=world_size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    _clear_caches()
    return Row(
        manifest_s=manifest_s,
        plan_ms=plan_ms,
        first_ms=first_ms,
        far_ms=far_ms,
        in_a_row_ms=in_a_row_ms,
        whole_ms=whole_ms,
        made_mib=made / 2**20,
        peak_mib=peak / 2**20,
    )


def _times_ms(plan: Plan, steps: Iterable[int], rank: int, world_size: int) -> list[float]:
    times = []
    for step in steps:
        start = time.perf_counter()
        plan.rank_rows(step, rank=rank, world_size=world_size)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _clear_caches() -> None:
    """The caches are the class's: those of an earlier plan would count as this one's memory."""
    for method in vars(Plan).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def _middle_and_most(times: list[float]) -> str:
    return f"{statistics.median(times):>8.2f} {max(times):>8.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sets", nargs="+", default=SETS, help="SAMPLES:SHARDS, one or two rows each (default: %(default)s)"
    )
    parser.add_argument("--sources", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--global_batch", type=int, default=65536)
    parser.add_argument("--sub_batch", type=int, default=64)
    parser.add_argument(
        "--cap", type=int, default=5_000_000, help="data.caps of the second row, if the mean source is larger"
    )
    parser.add_argument(
        "--span", type=int, default=1_000_000, help="steps that far apart ones are drawn from"
    )
    parser.add_argument("--steps", type=int, default=200, help="lookups of one rank (default: %(default)s)")
    parser.add_argument(
        "--whole_steps", type=int, default=5, help="lookups of a whole batch (default: %(default)s)"
    )
    parser.add_argument(
        "--memory_steps", type=int, default=1000, help="lookups before memory is read (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    warm_up = Plan(make_manifest(1000, 10, 2), Mixture(sub_batch_size=4), seed=SEED, global_batch_size=8)
    warm_up.global_batch(0)  # what numpy loads on first use is not the plan's
    sys.stdout.write(
        f"{platform.machine()}, {os.cpu_count()} CPUs, numpy {np.__version__}; {arguments.sources} sources, "
        f"{arguments.ranks:,} ranks, global batch {arguments.global_batch:,}, sub-batches of "
        f"{arguments.sub_batch}\n                                 manifest     plan    first   far apart, ms "
        "    in a row, ms    whole batch, ms     memory, MiB\n"
        "      samples   shards     caps         s       ms       ms   median     max   median     max   "
        "median     max    made    peak\n"
    )
    for name in arguments.sets:
        num_samples, num_shards = (int(float(number)) for number in name.split(":"))
        bites = num_samples / arguments.sources > arguments.cap
        for caps in (None, arguments.cap) if bites else (None,):
            row = measure(num_samples, num_shards, caps, arguments)
            sys.stdout.write(
                f"{num_samples:>13,} {num_shards:>8,} {caps or 'none':>8} {row.manifest_s:>9.2f} "
                f"{row.plan_ms:>8.1f} {row.first_ms:>8.2f} {_middle_and_most(row.far_ms)} "
                f"{_middle_and_most(row.in_a_row_ms)} {_middle_and_most(row.whole_ms)} {row.made_mib:>7.1f} "
                f"{row.peak_mib:>7.1f}\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
