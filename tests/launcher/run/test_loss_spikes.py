"""Which losses are reported as spikes, and what a run writes about them and about steps that were skipped."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agff.collectives import rank
from agff.trainer import StepReport
from launcher.run.log import WORST_PAIRS, RunLog
from launcher.run.loss_spikes import WINDOW, LossSpikes
from tests.agff.tiny import batch_of, global_rows
from tests.ranks import run_ranks


def noisy_losses(number: int) -> list[float]:
    generator = random.Random(0)
    return [3 - step / 1000 + generator.gauss(0, 0.1) for step in range(number)]


def test_only_a_loss_far_above_the_others_is_a_spike() -> None:
    judge = LossSpikes(deviations=6).judge
    assert [judge(loss) for loss in noisy_losses(500)] == [None] * 500
    spike = judge(4.5)
    assert spike is not None
    assert spike.loss == 4.5
    assert spike.mean == pytest.approx(2.55, abs=0.05)
    assert spike.standard_deviation == pytest.approx(0.1, abs=0.03)
    assert judge(1.0) is None, "a fall is none"
    assert judge(math.nan) is judge(math.inf) is None


def test_a_new_level_is_found_and_then_usual() -> None:
    judge = LossSpikes(deviations=6).judge
    found = [step for step, loss in enumerate([2.0] * 150 + [4.0] * 150) if judge(loss)]
    assert found[0] == 150
    assert found[-1] < 150 + WINDOW // 2


def test_a_loss_that_hardly_moves_and_a_run_that_just_began_have_none() -> None:
    judge = LossSpikes(deviations=6).judge
    assert judge(1.0) is judge(100.0) is None
    judge = LossSpikes(deviations=6).judge
    assert [judge(2.0 + (step % 50 == 49) * 0.05) for step in range(200)] == [None] * 200


def test_it_can_be_switched_off() -> None:
    judge = LossSpikes(deviations=None).judge
    assert [judge(loss) for loss in [*noisy_losses(200), 1e9]] == [None] * 201


def report(step: int, loss: float, *, applied: bool = True) -> StepReport:
    pairs = [
        (loss + offset, f"S-00000.tar:{step:06d}{index:02d}") for index, offset in enumerate(range(-10, 11))
    ]
    batch = batch_of(global_rows(len(pairs), 0, rows_without_image=range(0)), len(pairs), 0)
    return StepReport(
        step=step,
        loss=torch.tensor(loss),
        metrics={"batch_accuracy": torch.tensor(0.5)},
        pair_losses=tuple(pair[0] for pair in pairs),
        applied=applied,
        not_finite=() if applied else ("embedding",),
        gradient_norm=1.0,
        learning_rate=1e-3,
        wait_s=0.0,
        step_s=1.0,
        batch=replace(batch, addresses=tuple(pair[1] for pair in pairs)),
    )


def no_speed(report: StepReport) -> dict[str, float]:
    raise AssertionError("fewer steps than log_every")


def test_a_run_writes_the_worst_pairs_of_a_spike_and_the_pairs_of_a_skipped_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(
        tmp_path,
        measure_speed=no_speed,
        start_step=0,
        num_steps=99,
        log_every=50,
        log_samples=False,
        spike_deviations=6,
    )
    with log, caplog.at_level(logging.WARNING):
        for step in range(1, 41):
            log(report(step, 2.0 + step % 2 * 0.1))
        log(report(41, 30.0))
        log(report(42, math.nan, applied=False))
    [written] = [json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").read_text().splitlines()]
    assert (written["step"], written["loss"]) == (41, 30.0)
    assert written["mean"] == pytest.approx(2.05)
    assert [pair["loss"] for pair in written["worst_pairs"]] == [40.0 - place for place in range(WORST_PAIRS)]
    assert written["worst_pairs"][0]["address"] == "S-00000.tar:00004120"
    assert "step 41: loss 30 is " in caplog.text
    assert "worst pair S-00000.tar:00004120 (40)" in caplog.text
    [written] = [json.loads(line) for line in (tmp_path / "not_finite.jsonl").read_text().splitlines()]
    assert (written["step"], written["loss"], len(written["addresses"])) == (42, "nan", 21)
    assert "step 42 skipped on all ranks: the gradient was not finite" in caplog.text
    assert "outputs of the model that were not finite: embedding" in caplog.text


def log_on_a_rank(run: Path) -> None:
    log = RunLog(
        run,
        measure_speed=no_speed,
        start_step=0,
        num_steps=99,
        log_every=50,
        log_samples=False,
        spike_deviations=6,
    )
    with log:
        for step in range(1, 31):
            log(report(step, 2.0 + step % 2 * 0.1 + rank()))
        log(report(31, 30.0 + 100 * rank()))


def test_a_spike_is_found_once_with_the_worst_pairs_of_all_ranks(tmp_path: Path) -> None:
    run_ranks(log_on_a_rank, tmp_path, world_size=2)
    [written] = [json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").read_text().splitlines()]
    assert (written["step"], written["loss"]) == (31, 80.0)
    assert [pair["loss"] for pair in written["worst_pairs"]] == [
        140.0 - place for place in range(WORST_PAIRS)
    ]
