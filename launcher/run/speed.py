"""How fast a run is, what part of the device it uses, and what keeps it from more."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Self

import torch

from agff.collectives import gather_objects, max_over_ranks
from agff.flops import ModelFlops, StepFlops
from agff.kept_vision import FeatureMemory
from agff.trainer import StepReport
from launcher.run.device_peak import peak_flops
from launcher.run.hardware import Precision


@dataclass(frozen=True, kw_only=True)
class SpeedMeter:
    """Measures a step over all ranks."""

    flops: ModelFlops
    device: torch.device
    memory: FeatureMemory
    """The engine's: it restarts torch's peak in every step, and knows the highest one."""
    peak_flops: float | None
    """Of one device; None where it is not known, as on a CPU."""

    @classmethod
    def of_device(
        cls, flops: ModelFlops, device: torch.device, precision: Precision, *, memory: FeatureMemory
    ) -> Self:
        """With the peak of the device at hand, if it is known."""
        peak = None
        if device.type == "cuda":
            peak = peak_flops(
                torch.cuda.get_device_name(device),
                precision,
                allows_tf32=torch.get_float32_matmul_precision() != "highest",
            )
        return cls(flops=flops, device=device, memory=memory, peak_flops=peak)

    def measure(self, report: StepReport) -> dict[str, float]:
        """Values of one step by name, the same on every rank. Collective."""
        batch = report.batch
        (num_chunks,) = max_over_ranks([len(batch.chunks)], device=self.device)
        computed = batch.padded_to(num_chunks=num_chunks, num_negatives=batch.num_negatives)
        ranks = gather_objects(
            RankStep(
                flops=self.flops.of_batch(computed),
                num_pairs=batch.num_pairs,
                wait_s=report.wait_s,
                step_s=report.step_s,
                peak_memory_bytes=peak_memory_bytes(self.memory),
            )
        )
        return values_of(ranks, self.peak_flops)


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """What one rank measured of a step."""

    flops: StepFlops
    num_pairs: int
    wait_s: float
    step_s: float
    peak_memory_bytes: int


def values_of(ranks: list[RankStep], peak_flops: float | None) -> dict[str, float]:
    """What the log shows of one step. TFLOP/s are of one device, useful ones.

    rank_imbalance: executed FLOPs of the rank that has most, over their mean; the others wait for it.
    padding_percent: of the tokens that are computed. data_wait_percent: of the rank that waits longest.
    """
    step_s = max(rank.step_s for rank in ranks)
    flops = [rank.flops for rank in ranks]
    useful, executed = (sum(part) for part in zip(*((f.useful, f.executed) for f in flops), strict=True))
    num_tokens = sum(f.num_tokens for f in flops)
    values = {
        "speed/samples_per_s": sum(rank.num_pairs for rank in ranks) / step_s,
        "speed/tokens_per_s": num_tokens / step_s,
        "speed/patches_per_s": sum(f.num_patches for f in flops) / step_s,
        "speed/tflops_per_s": useful / len(ranks) / step_s / 1e12,
        "speed/executed_per_useful": executed / useful,
        "speed/padding_percent": 100 * (1 - num_tokens / sum(f.num_padded_tokens for f in flops)),
        "speed/rank_imbalance": max(f.executed for f in flops) * len(ranks) / executed,
        "speed/data_wait_percent": 100 * max(rank.wait_s for rank in ranks) / step_s,
        "speed/peak_memory_gib": max(rank.peak_memory_bytes for rank in ranks) / 2**30,
    }
    if peak_flops is not None:
        in_step = peak_flops * len(ranks) * step_s
        values |= {
            "speed/mfu_percent": 100 * useful / in_step,
            "speed/hfu_percent": 100 * executed / in_step,
        }
    return values


def peak_memory_bytes(memory: FeatureMemory) -> int:
    """The most that was held at once so far: of a GPU's memory since its engine was built, else of the
    machine's since the process began."""
    if memory.highest_peak is not None:
        return memory.highest_peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
