"""What a person sees of a run: progress bar, TensorBoard, messages. Rank 0 writes; every rank measures."""

from __future__ import annotations

import heapq
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from agff.collectives import gather_objects, mean_over_ranks, rank, world_size
from agff.trainer import StepReport
from launcher.run.loss_spikes import LossSpikes, Spike

WORST_PAIRS = 16
"""Pairs of a step with a loss spike that are written down."""
MOST_SCORES = 16
"""Of a validation on one line; of more, only the means and those without parts."""

log = logging.getLogger(__name__)


class RunLog:
    """Observer of the training loop; each rank makes one and calls it after every step. Collective."""

    def __init__(
        self,
        run_dir: Path,
        *,
        measure_speed: Callable[[StepReport], Mapping[str, float]],
        start_step: int,
        num_steps: int,
        log_every: int,
        log_samples: bool,
        spike_deviations: float | None,
    ) -> None:
        """measure_speed: a collective (`launcher.run.speed.SpeedMeter.measure`)."""
        self._measure_speed = measure_speed
        self._log_every = log_every
        self._is_writer = rank() == 0
        self._run_dir = run_dir
        self._skipped: Counter[str] = Counter()
        self._spikes = LossSpikes(deviations=spike_deviations)
        self._samples: TextIO | None = None
        if log_samples:
            path = run_dir / "samples" / f"{rank():05d}-of-{world_size():05d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._samples = path.open("a", buffering=1)
        self._writer = (
            SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
            if self._is_writer
            else None
        )
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            desc="train",
            unit="step",
            disable=not self._is_writer,
            dynamic_ncols=True,
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._samples is not None:
            self._samples.close()

    def __call__(self, report: StepReport) -> None:
        """Collective on every step (skipped samples, spikes) and on each `log_every`-th (metrics)."""
        own = torch.stack([report.loss.float(), report.loss.new_tensor(len(report.batch.skipped)).float()])
        # the same numbers on every rank: what follows is collective
        loss, num_skipped = mean_over_ranks(own).tolist()
        if num_skipped:
            self._note_skipped(report)
        if spike := self._spikes.judge(loss):
            self._note_spike(report, spike)
        if self._samples is not None:
            self._samples.write(json.dumps({"step": report.step, "addresses": report.batch.addresses}) + "\n")
        if not report.applied:
            self._note_not_finite(report)
        self._bar.update()
        if report.step % self._log_every:
            return
        values = self._measure(report)
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, report.step)
        self._bar.set_postfix_str(
            f"loss {values['train/loss']:.3f}, {values['speed/samples_per_s']:.1f} samples/s, "
            f"{values['speed/tokens_per_s']:.0f} tokens/s, {_use_of_device(values)}, "
            f"data wait {values['speed/data_wait_percent']:.0f} %"
        )

    def validated(
        self, step: int, scores: Mapping[str, float], seconds: float, best_step: int | None
    ) -> None:
        """Write the scores of a validation. best_step: that of the checkpoint that is kept for its score."""
        if self._writer is None:
            return
        for name, score in scores.items():
            self._writer.add_scalar(f"validation/{name}", score, step)
        shown = {
            name: score for name, score in scores.items() if len(scores) <= MOST_SCORES or "/" not in name
        }
        text = ", ".join(f"{name} {score:.4g}" for name, score in shown.items()) or "no scores"
        best = f"; best: step {best_step}" if best_step is not None else ""
        tqdm.write(f"validation after step {step} ({seconds:.1f} s): {text}{best}")

    def _measure(self, report: StepReport) -> dict[str, float]:
        measured = {"loss": report.loss, **report.metrics}
        metrics = mean_over_ranks(torch.stack([value.float() for value in measured.values()])).tolist()
        return {
            **{f"train/{name}": value for name, value in zip(measured, metrics, strict=True)},
            "train/gradient_norm": report.gradient_norm,
            "train/learning_rate": report.learning_rate,
            **self._measure_speed(report),
            "data/skipped_samples": self._skipped.total(),
            **{f"data/skipped_samples/{source}": count for source, count in self._skipped.items()},
        }

    def _note_not_finite(self, report: StepReport) -> None:
        """`applied` is the same on all ranks, so they come here together."""
        losses = gather_objects(report.loss.item())
        outputs = sorted({name for names in gather_objects(report.not_finite) for name in names})
        addresses = gather_objects(report.batch.addresses)
        if self._is_writer:
            log.warning(
                "step %d skipped on all ranks: the gradient was not finite; losses by rank: %s; outputs of "
                "the model that were not finite: %s",
                report.step,
                losses,
                ", ".join(outputs) or "none",
            )
            with (self._run_dir / "not_finite.jsonl").open("a") as file:
                for rank_losses, pairs in zip(losses, addresses, strict=True):
                    file.write(
                        json.dumps({"step": report.step, "loss": str(rank_losses), "addresses": pairs}) + "\n"
                    )

    def _note_spike(self, report: StepReport, spike: Spike) -> None:
        worst = heapq.nlargest(WORST_PAIRS, zip(report.pair_losses, report.batch.addresses, strict=True))
        worst = heapq.nlargest(WORST_PAIRS, (pair for pairs in gather_objects(worst) for pair in pairs))
        if not self._is_writer:
            return
        log.warning(
            "step %d: loss %.4g is %.1f standard deviations above the mean %.4g of the steps before; worst "
            "pair %s (%.4g), more in loss_spikes.jsonl",
            report.step,
            spike.loss,
            spike.deviations,
            spike.mean,
            worst[0][1],
            worst[0][0],
        )
        with (self._run_dir / "loss_spikes.jsonl").open("a") as file:
            pairs = [{"loss": loss, "address": address} for loss, address in worst]
            file.write(json.dumps({"step": report.step, **asdict(spike), "worst_pairs": pairs}) + "\n")

    def _note_skipped(self, report: StepReport) -> None:
        skipped = [sample for samples in gather_objects(report.batch.skipped) for sample in samples]
        self._skipped.update(sample.source for sample in skipped)
        if self._is_writer:
            with (self._run_dir / "skipped.jsonl").open("a") as file:
                for sample in skipped:
                    log.warning(
                        "step %d: sample left out, another of %s taken: %s",
                        report.step,
                        sample.source,
                        sample.reason,
                    )
                    file.write(
                        json.dumps({"step": report.step, "source": sample.source, "sample": sample.reason})
                        + "\n"
                    )


def _use_of_device(values: Mapping[str, float]) -> str:
    if "speed/mfu_percent" in values:
        return f"MFU {values['speed/mfu_percent']:.0f} %, HFU {values['speed/hfu_percent']:.0f} %"
    return f"executed {values['speed/executed_per_useful']:.2f} x useful"
