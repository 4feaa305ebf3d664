"""The loader: step -> batch, in worker processes. Its whole state is the step."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from agff.batch import Batch, ProcessItems, SeesPairs, SkippedSample
from agff.errors import AgffError, DataError
from data_pipeline.collate import Chunking, collate
from data_pipeline.decode import Example, decode
from data_pipeline.handover import HandedBatch, Slots
from data_pipeline.plan import Plan
from data_pipeline.reader import RawSample, ShardReader
from data_pipeline.vectors import Vectors

PREFETCH = 2
"""Batches that each worker prepares ahead."""
WARN_AFTER_S = 30
"""A longer wait for a batch is worth a warning that names the shard being read."""

log = logging.getLogger(__name__)
_Decode = Callable[[RawSample, str, Callable[[int], int]], Example]
"""A sample, its source, and what chooses one of that many regions."""


@dataclass(kw_only=True)
class StepBatches(Dataset[Batch | HandedBatch[Batch] | DataError]):
    """Batch of this rank at any step, by index, whatever the number of workers and the steps before."""

    plan: Plan
    reader: ShardReader
    process: ProcessItems
    rank: int
    world_size: int
    chunking: Chunking
    max_bad_in_a_row: int
    """Redraws of one row before giving up."""
    with_negatives: bool = True
    """Explicit hard negatives, where a source has them, are part of the batch."""
    objective: SeesPairs | None = None
    """What it makes of each pair is in the batch."""
    vectors: Vectors | None = None
    """Of a teacher, for each pair."""
    seen_pixels: int | None = None
    """What the model sees of one image at most; much larger JPEGs are decoded at a fraction of their size."""
    fetch_ahead_steps: int = 0
    """Remote shards are fetched this many steps before they are read."""
    num_steps: int | None = None
    """Of the whole run: nothing is fetched ahead for later ones."""
    watch: Watch | None = None
    slots: Slots | None = None
    """Where a worker leaves its batches; None: they are returned as they are."""

    def __post_init__(self) -> None:
        self._next_to_announce = 0

    def __getitem__(self, step: int) -> Batch | HandedBatch[Batch] | DataError:
        """The batch, or the error that prevents it: as a value, it passes from the worker unchanged."""
        worker = get_worker_info()
        try:
            self._fetch_ahead(step)
            batch = self._batch(step)
            return self.slots.hand(batch, worker.id) if self.slots and worker else batch
        except AgffError as error:
            return DataError(str(error))
        except Exception as error:  # a bug: all ranks must still end together, and know where it was
            return DataError(f"step {step}: {error!r}\n{traceback.format_exc()}")
        finally:
            if self.watch:
                self.watch.done()

    def _fetch_ahead(self, step: int) -> None:
        """Announce the steps that this worker will make, from this one on: its own shards then come several
        at a time."""
        if not self.fetch_ahead_steps:
            return
        worker = get_worker_info()
        stride = worker.num_workers if worker else 1
        last = step + self.fetch_ahead_steps
        if self.num_steps is not None:
            last = min(last, self.num_steps - 1)
        for coming in range(max(step, self._next_to_announce), last + 1, stride):
            rows = self.plan.rank_rows(coming, rank=self.rank, world_size=self.world_size)
            for source in np.unique(rows[:, 0]):
                self.reader.fetch_ahead(self.plan.source_names[source], rows[rows[:, 0] == source, 1])
            self._next_to_announce = coming + stride

    def _batch(self, step: int) -> Batch:
        try:
            return self._assemble(step, self._decode)
        except DataError:  # perhaps an item decodes but does not fit the backbone: process each alone
            return self._assemble(step, self._decode_and_process)

    def examples(self, step: int) -> list[Example]:
        """The rank's pairs of a step, before they are processed. Raises DataError."""
        return self._examples(step, self._decode, [])

    def _assemble(self, step: int, decode_sample: _Decode) -> Batch:
        skipped: list[SkippedSample] = []
        examples = self._examples(step, decode_sample, skipped)
        return collate(examples, self.process, chunking=self.chunking, skipped=skipped)

    def _examples(self, step: int, decode_sample: _Decode, skipped: list[SkippedSample]) -> list[Example]:
        numbers = self.plan.row_numbers(rank=self.rank, world_size=self.world_size)
        rows = self.plan.rank_rows(step, rank=self.rank, world_size=self.world_size)
        return [
            self._example(step, int(number), int(source), int(sample), decode_sample, skipped)
            for number, (source, sample) in zip(numbers, rows, strict=True)
        ]

    def _example(
        self,
        step: int,
        row: int,  # of the global batch: any number of ranks draws the same instead
        source: int,
        sample: int,
        decode_sample: _Decode,
        skipped: list[SkippedSample],
    ) -> Example:
        """The row's example; an unusable one goes into `skipped`, and another of its source is drawn."""
        failures: list[str] = []
        name = self.plan.source_names[source]
        while len(failures) <= self.max_bad_in_a_row:
            if self.watch:
                self.watch.reading(step, source, sample)
            try:
                region = functools.partial(self.plan.region, step=step, row=row, attempt=len(failures))
                example = decode_sample(self.reader.read(name, sample), name, region)
                if self.vectors and self.vectors.is_absent(name, sample):
                    raise DataError(f"{example.address}: the teacher has no vector of a side of it")
            except DataError as error:  # not StorageError: the order must not depend on the network
                failures.append(str(error))
                skipped.append(SkippedSample(name, str(error)))
                sample = self.plan.redraw(step, row, attempt=len(failures))
                continue
            # behind the handler: a teacher's vector that cannot be used is no sample to pass over
            vectors = self.vectors.read(name, sample) if self.vectors else None
            return dataclasses.replace(example, vectors=vectors)
        limit = f"allowed are {self.max_bad_in_a_row} (data.max_bad_in_a_row)"
        what = f"{len(failures)} bad samples in a row for row {row} of step {step}, {limit}"
        raise DataError("\n  ".join([f"{what}:", *failures]))

    def _decode(self, raw: RawSample, source: str, region: Callable[[int], int]) -> Example:
        example = decode(
            raw,
            source=source,
            with_negatives=self.with_negatives,
            seen_pixels=self.seen_pixels,
            draw=region,
        )
        return example.seen_by(self.objective) if self.objective else example

    def _decode_and_process(self, raw: RawSample, source: str, region: Callable[[int], int]) -> Example:
        example = self._decode(raw, source, region)
        for item in example.items:
            self.process([item])
        return example


class Watch:
    """What each worker reads, in shared memory: so that a stall has a name."""

    def __init__(self, num_workers: int) -> None:
        self._board = torch.full((num_workers, 4), -1, dtype=torch.float64).share_memory_()

    def reading(self, step: int, source: int, sample: int) -> None:
        """Called by a worker before it reads."""
        self._own().copy_(torch.tensor([step, source, sample, time.monotonic()], dtype=torch.float64))

    def done(self) -> None:
        """Called by a worker when its batch is complete."""
        self._own()[0] = -1

    def describe(self, step: int, batches: StepBatches) -> str:
        """Who is at work on `step`, with what, since when."""
        for worker, (at_step, source, sample, since) in enumerate(self._board.tolist()):
            if int(at_step) == step:
                name = batches.plan.source_names[int(source)]
                shard = (
                    f"{batches.reader.folder.location}/{name}/{batches.reader.shard_name(name, int(sample))}"
                )
                return f"worker {worker} has been reading {shard} for {time.monotonic() - since:.0f} s"
        return "no worker has begun with it"

    def _own(self) -> Tensor:
        worker = get_worker_info()
        return self._board[worker.id if worker else 0]


def load_batches(
    batches: StepBatches, *, start_step: int, num_steps: int, num_workers: int, stalled_after_s: float = 300
) -> Generator[Batch]:
    """Batches of steps start_step .. num_steps - 1 in order, prepared ahead by `num_workers` processes.

    Resume is start_step; `close` ends the processes. A batch's tensors are valid until the next batch is
    asked for. Raises DataError when a batch cannot be made, a worker dies, or none comes within
    `stalled_after_s`; without workers nothing watches the reading. A worker that is killed while the caller
    computes may show as torch's RuntimeError there.
    """
    watch = Watch(max(1, num_workers))
    slots = Slots(num_workers, slots_per_worker=PREFETCH + 1)
    loader = DataLoader(
        dataclasses.replace(batches, num_steps=num_steps, watch=watch, slots=slots),
        batch_size=None,
        sampler=range(start_step, num_steps),
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_outlive_requests_to_stop if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,  # the slots are inherited
        pin_memory=torch.cuda.is_available(),
        timeout=min(WARN_AFTER_S, stalled_after_s) if num_workers else 0,
        # its seed for workers must not be drawn from the training's random state
        generator=torch.Generator(),
    )
    others = set(multiprocessing.active_children())
    steps = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    for worker in workers:
        # if this process ends early, multiprocessing would wait for them in vain
        atexit.register(worker.kill)
    try:
        for step in range(start_step, num_steps):
            batch = _next_batch(steps, step, batches, watch, stalled_after_s)
            if isinstance(batch, DataError):
                raise batch
            yield batch.open() if isinstance(batch, HandedBatch) else batch
    finally:
        if num_workers:  # waits for them a while; torch has no public name for it
            steps._shutdown_workers()  # type: ignore[attr-defined]
        for worker in workers:
            worker.kill()  # one that hangs in a read hears nothing else
            atexit.unregister(worker.kill)


def _outlive_requests_to_stop(worker: int) -> None:
    """Slurm signals all processes; a rank needs its workers until it has saved, and ends them itself."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _next_batch(
    steps: Iterator[Batch | HandedBatch[Batch] | DataError],
    step: int,
    batches: StepBatches,
    watch: Watch,
    stalled_after_s: float,
) -> Batch | HandedBatch[Batch] | DataError:
    started = time.monotonic()
    while True:
        try:
            return next(steps)
        except (RuntimeError, OSError, EOFError) as error:  # the last two: it died handing over a tensor
            if not str(error).startswith("DataLoader timed out after"):
                raise DataError(
                    f"rank {batches.rank}: a loader worker died before step {step} ({error}); if it was "
                    "killed for memory, lower data.num_workers. The same command continues from the last "
                    "checkpoint"
                ) from error
        waited = time.monotonic() - started
        message = (
            f"rank {batches.rank} has waited {waited:.0f} s for the batch of step {step}: "
            f"{watch.describe(step, batches)}"
        )
        if waited >= stalled_after_s:
            raise DataError(f"{message}; gave up after data.stalled_after_s={stalled_after_s:g}")
        log.warning(message)
