"""The training loop: fetch, step, report, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from agff.batch import Batch, SkippedSample
from agff.collectives import all_ranks_agree, gather_objects
from agff.engine import Engine
from agff.errors import AgffError, DataError
from agff.step import Objective, train_step


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one finished step tells an observer on this rank."""

    step: int
    """Steps finished, this one included."""
    metrics: Tensor
    """The objective's metrics of the local rows."""
    applied: bool
    gradient_norm: float
    learning_rate: float
    """What this step used."""
    num_pairs: int
    num_tokens: int
    """Real tokens of this rank's queries, targets and explicit negatives."""
    wait_s: float
    """Time spent waiting for the batch."""
    step_s: float
    """Time of the whole step, the wait included."""
    addresses: tuple[str, ...]
    """Of this rank's pairs."""
    skipped: tuple[SkippedSample, ...]
    """Samples of this rank's batch that were redrawn because they could not be used."""


def train(
    engine: Engine,
    objective: Objective,
    batches: Iterator[Batch],
    *,
    start_step: int,
    num_steps: int,
    save_every: int,
    observe: Callable[[StepReport], None],
    save: Callable[[int], None],
) -> None:
    """Run steps start_step .. num_steps - 1; save every `save_every` steps and at the end.

    Collective. A data error on one rank is raised on all of them, with that rank's message.
    """
    for step in range(start_step, num_steps):
        started = time.perf_counter()
        batch = _next_on_all_ranks(batches, engine)
        waited = time.perf_counter()
        learning_rate = engine.learning_rate
        result = train_step(engine, objective, batch)
        observe(
            StepReport(
                step=step + 1,
                metrics=result.metrics,
                applied=result.applied,
                gradient_norm=engine.gradient_norm if result.applied else float("nan"),
                learning_rate=learning_rate,
                num_pairs=batch.num_pairs,
                num_tokens=batch.num_tokens,
                wait_s=waited - started,
                step_s=time.perf_counter() - started,
                addresses=batch.addresses,
                skipped=batch.skipped,
            )
        )
        if (step + 1) % save_every == 0 or step + 1 == num_steps:
            save(step + 1)


def _next_on_all_ranks(batches: Iterator[Batch], engine: Engine) -> Batch:
    """The next batch on the device, or the same DataError on every rank."""
    error: AgffError | None = None
    batch: Batch | None = None
    try:
        batch = next(batches)
    except AgffError as caught:
        error = caught
    if not all_ranks_agree(error is None, device=engine.device):
        raise DataError(next(message for message in gather_objects(str(error) if error else None) if message))
    assert batch is not None
    return batch.to(engine.device)
