"""The loader: step -> batch, in worker processes. Its whole state is the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from agff.batch import Batch, EncodeItems
from agff.errors import DataError
from data_pipeline.collate import collate
from data_pipeline.decode import Example, decode
from data_pipeline.plan import Plan
from data_pipeline.reader import RawSample, ShardReader

STALLED_AFTER_S = 600
"""A batch that takes longer is an error: a hanging file system must not hang the job."""


@dataclass(frozen=True, kw_only=True)
class StepBatches(Dataset[Batch | DataError]):
    """Batch of this rank at any step, by index. The same whatever the number of workers and ranks' history."""

    plan: Plan
    reader: ShardReader
    encode_items: EncodeItems
    rank: int
    world_size: int
    chunk_size: int
    max_bad_in_a_row: int
    """Redraws of one row before giving up."""

    def __getitem__(self, step: int) -> Batch | DataError:
        """The batch, or the error that prevents it: a value, so that it crosses the process border as it is."""
        try:
            return self._batch(step)
        except DataError as error:
            return error

    def _batch(self, step: int) -> Batch:
        try:
            return self._assemble(step, decode)
        except DataError:  # perhaps an item that decodes but does not fit the backbone: find it by encoding each alone
            return self._assemble(step, self._decode_and_encode)

    def _assemble(self, step: int, decode_sample: Callable[[RawSample], Example]) -> Batch:
        rows = self.plan.rank_rows(step, rank=self.rank, world_size=self.world_size)
        skipped: list[str] = []
        examples = [
            self._example(step, self.rank * len(rows) + row, int(source), int(sample), decode_sample, skipped)
            for row, (source, sample) in enumerate(rows)
        ]
        return collate(examples, self.encode_items, chunk_size=self.chunk_size, skipped=skipped)

    def _example(
        self,
        step: int,
        row: int,
        source: int,
        sample: int,
        decode_sample: Callable[[RawSample], Example],
        skipped: list[str],
    ) -> Example:
        """The row's example; one that cannot be used is noted in `skipped` and another of its source drawn."""
        failures: list[str] = []
        while len(failures) <= self.max_bad_in_a_row:
            try:
                return decode_sample(self.reader.read(self.plan.source_names[source], sample))
            except DataError as error:
                failures.append(str(error))
                skipped.append(str(error))
                sample = self.plan.redraw(step, row, attempt=len(failures))
        raise DataError(
            f"{len(failures)} bad samples in a row for row {row} of step {step}, allowed are {self.max_bad_in_a_row} "
            f"(data.max_bad_in_a_row); the last: {'; '.join(failures[-3:])}"
        )

    def _decode_and_encode(self, raw: RawSample) -> Example:
        example = decode(raw)
        for item in (example.query, example.target):
            try:
                self.encode_items([item])
            except DataError as error:
                raise DataError(f"{raw.address}: {error}") from None
        return example


def load_batches(batches: StepBatches, *, start_step: int, num_steps: int, num_workers: int) -> Iterator[Batch]:
    """Batches of steps start_step .. num_steps - 1 in order, prepared ahead by `num_workers` processes.

    Resume is start_step. Raises DataError when a batch cannot be made or none comes within STALLED_AFTER_S.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start_step, num_steps),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        timeout=STALLED_AFTER_S if num_workers else 0,
        generator=torch.Generator(),  # its seed for workers must not be drawn from the training's random state
    )
    steps = iter(loader)
    for step in range(start_step, num_steps):
        try:
            batch = next(steps)
        except RuntimeError as error:
            raise DataError(f"step {step}: the loader's worker died or stalled: {error}") from error
        if isinstance(batch, DataError):
            raise batch
        yield batch
