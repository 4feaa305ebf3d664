"""The training loop: fetch, step, report, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from agff.batch import Batch
from agff.collectives import max_over_ranks, raise_together
from agff.engine import Engine
from agff.errors import AgffError, TrainingError
from agff.objectives.objective import Objective
from agff.similarity import FusionConfig
from agff.step import train_step


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What an observer on this rank gets of one finished step."""

    step: int
    """Steps finished, this one included."""
    loss: Tensor
    """Of the local rows, on the device."""
    metrics: Mapping[str, Tensor]
    """The objective's, of the local rows, on the device."""
    pair_losses: tuple[float, ...]
    """Of this rank's pairs, in the order of `batch.addresses`."""
    applied: bool
    not_finite: tuple[str, ...]
    """Names of the model's outputs that were not finite on this rank, where the step was not applied."""
    gradient_norm: float
    learning_rate: float
    """What this step used."""
    wait_s: float
    """Time spent waiting for the batch."""
    step_s: float
    """Time of the whole step, the wait included."""
    batch: Batch
    """Its chunks are on the CPU, without the fillers that other ranks' chunks made necessary."""


def train(
    engine: Engine,
    objective: Objective,
    fusion: FusionConfig,
    batches: Iterator[Batch],
    *,
    start_step: int,
    num_steps: int,
    save_every: int,
    max_skipped_in_a_row: int,
    observe: Callable[[StepReport], None],
    save: Callable[[int], None],
    after_step: Callable[[int], None],
    should_stop: Callable[[], bool],
    mark: Callable[[str], None],
) -> bool:
    """Run steps start_step .. num_steps - 1; True when done, False when stopped on request.

    save: called every `save_every` steps and at the end.
    after_step: called with the number of finished steps, after the save where there is one; it must leave
    engine and random states as they are.
    should_stop: whether this rank was asked to stop; when one was, all of them save and return after the same
    step.
    mark: called with what this rank does next.

    Collective. A data error on one rank is raised on all of them, with that rank's message. Raises
    TrainingError when more than `max_skipped_in_a_row` steps in a row had a gradient that was not finite.
    """
    skipped_in_a_row = 0
    for step in range(start_step, num_steps):
        started = time.perf_counter()
        mark(f"waiting for the batch of step {step + 1}")
        batch, wait_s = _next_on_all_ranks(batches, engine, should_stop)
        if batch is None:
            if step > start_step and step % save_every:
                mark(f"saving step {step}")
                save(step)
            return False
        mark(f"in step {step + 1}")
        learning_rate = engine.learning_rate
        result = train_step(engine, objective, fusion, batch)
        observe(
            StepReport(
                step=step + 1,
                loss=result.loss,
                metrics=result.metrics,
                pair_losses=tuple(result.pair_loss_B.tolist()),
                applied=result.applied,
                not_finite=result.not_finite,
                gradient_norm=engine.gradient_norm if result.applied else float("nan"),
                learning_rate=learning_rate,
                wait_s=wait_s,
                step_s=time.perf_counter() - started,
                batch=batch,
            )
        )
        skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
        if skipped_in_a_row > max_skipped_in_a_row:
            raise TrainingError(
                f"the gradient was not finite in {skipped_in_a_row} steps in a row, allowed are "
                f"{max_skipped_in_a_row} (max_skipped_in_a_row); lower optimizer.learning_rate, and look at "
                "the pairs in not_finite.jsonl"
            ).shared()
        if (step + 1) % save_every == 0 or step + 1 == num_steps:
            mark(f"saving step {step + 1}")
            save(step + 1)
        after_step(step + 1)
    return True


def _next_on_all_ranks(
    batches: Iterator[Batch], engine: Engine, should_stop: Callable[[], bool]
) -> tuple[Batch | None, float]:
    """(the next batch on the device, seconds this rank waited for it); None when any rank was asked to stop.
    A DataError is raised by all."""
    error: AgffError | None = None
    batch: Batch | None = None
    started = time.perf_counter()
    try:
        batch = next(batches)
    except AgffError as caught:
        error = caught
    wait_s = time.perf_counter() - started  # without that for the other ranks, which follows
    any_failed, any_stops = max_over_ranks([error is not None, should_stop()], device=engine.device)
    if any_failed:
        raise_together(error)
    if any_stops:
        return None, wait_s
    assert batch is not None
    return batch.to(engine.device), wait_s
