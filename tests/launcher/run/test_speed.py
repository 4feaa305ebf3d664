"""What the log shows of a step."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from agff.backbone import BackboneConfig
from agff.batch import Batch
from agff.collectives import rank
from agff.flops import ModelFlops, StepFlops
from agff.kept_vision import DeviceMemory, FeatureMemory
from agff.prompts import PromptConfig
from agff.trainer import StepReport
from launcher.run.device_peak import DEVICE_PEAKS, peak_flops
from launcher.run.speed import RankStep, SpeedMeter, peak_memory_bytes, values_of
from tests.agff.tiny import batch_of, global_rows, tiny_folder
from tests.ranks import run_ranks

FLOPS = StepFlops(
    vision_forward=0,
    language_forward=0,
    useful=2 * 10**12,
    needed=0,
    executed=3 * 10**12,
    num_patches=40,
    num_tokens=60,
    num_padded_tokens=80,
)
STEP = RankStep(flops=FLOPS, num_pairs=8, wait_s=0.5, step_s=2.0, peak_memory_bytes=2**30)


def test_values_are_those_of_all_ranks() -> None:
    busy = replace(FLOPS, useful=4 * 10**12, executed=9 * 10**12, num_tokens=100, num_padded_tokens=120)
    ranks = [STEP, replace(STEP, flops=busy, wait_s=1.0, peak_memory_bytes=2**31)]
    expected = {
        "speed/samples_per_s": 8.0,
        "speed/tokens_per_s": 80.0,
        "speed/patches_per_s": 40.0,
        "speed/tflops_per_s": 1.5,
        "speed/executed_per_useful": 2.0,
        "speed/padding_percent": 20.0,
        "speed/rank_imbalance": 1.5,
        "speed/data_wait_percent": 50.0,
        "speed/peak_memory_gib": 2.0,
    }
    assert values_of(ranks, None) == pytest.approx(expected)
    utilisation = {"speed/mfu_percent": 15.0, "speed/hfu_percent": 30.0}
    assert values_of(ranks, 1e13) == pytest.approx(expected | utilisation)


@pytest.mark.parametrize(
    ("name", "precision", "allows_tf32", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494.7),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 66.9),
        ("NVIDIA H100 PCIe", "bf16", False, 756),
        ("NVIDIA H200", "bf16", False, 989.4),
        ("NVIDIA H200 NVL", "bf16", False, 835.5),
        ("NVIDIA A100-SXM4-80GB", "bf16_autocast", False, 312),
        ("NVIDIA A100 80GB PCIe", "bf16", False, 312),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA L4", "bf16", False, 121),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("Tesla V100-SXM2-32GB", "fp32", True, 15.7),
        ("Tesla V100-SXM2-32GB", "bf16", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", False, None),
        ("Another", "bf16", False, None),
    ],
)
def test_the_peak_of_a_device(name: str, precision: Any, allows_tf32: bool, tflops: float | None) -> None:
    peak = peak_flops(name, precision, allows_tf32=allows_tf32)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_peaks_are_dense_ones() -> None:
    """TF32 is half of bf16, but for rounding, and half again of what sheets print with sparsity."""
    for device in DEVICE_PEAKS:
        assert device.source.startswith("https://")
        if device.bf16 is not None and device.tf32 is not None:
            assert device.bf16 / device.tf32 == pytest.approx(2, rel=0.02)


def meter() -> SpeedMeter:
    flops = ModelFlops.of_config(
        AutoConfig.from_pretrained(tiny_folder().name),
        BackboneConfig(path="", freeze_vision=True),
        PromptConfig(num_fine=1),
        keeps_vision=True,
        first_pass_chunks=1,
    )
    return SpeedMeter.of_device(
        flops, torch.device("cpu"), "fp32", memory=FeatureMemory("gpu", torch.device("cpu"))
    )


def batch_of_rank(number: int) -> Batch:
    rows = global_rows(8, 1, rows_without_image=range(6, 8))
    return batch_of(rows[: 4 - 2 * number], 2, 1)


def measure_on_a_rank() -> dict[str, float]:
    batch = batch_of_rank(rank())
    report = StepReport(
        step=1,
        loss=torch.zeros(()),
        metrics={},
        pair_losses=(),
        applied=True,
        not_finite=(),
        gradient_norm=1.0,
        learning_rate=1e-3,
        wait_s=0.1,
        step_s=1.0,
        batch=batch,
    )
    return meter().measure(report)


class Memory:
    """Of a GPU whose peak is 7 since it was restarted."""

    peak = 9

    def now(self) -> DeviceMemory:
        return DeviceMemory(total=10, usable=10, peak=self.peak)

    def restart_peak(self) -> None:
        self.peak = 7


def test_the_peak_is_the_engine_s_on_a_gpu_and_the_process_s_on_a_cpu() -> None:
    assert peak_memory_bytes(FeatureMemory("off", torch.device("cuda"), reader=Memory())) == 7
    resident = peak_memory_bytes(FeatureMemory("off", torch.device("cpu")))
    assert resident >= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000 > 10**8


def test_a_rank_with_fewer_chunks_computes_fillers_which_are_no_use() -> None:
    first, second = run_ranks(measure_on_a_rank, world_size=2)
    assert {name: value for name, value in first.items() if "memory" not in name} == {
        name: value for name, value in second.items() if "memory" not in name
    }
    long, short = batch_of_rank(0), batch_of_rank(1)
    flops = meter().flops
    parts = [
        flops.of_batch(batch.padded_to(num_chunks=len(long.chunks), num_negatives=batch.num_negatives))
        for batch in (long, short)
    ]
    assert parts[1].useful == flops.of_batch(short).useful
    assert parts[1].executed > flops.of_batch(short).executed
    executed = [part.executed for part in parts]
    assert first["speed/rank_imbalance"] == pytest.approx(2 * executed[0] / sum(executed))
    assert first["speed/samples_per_s"] == 6
    assert first["speed/tokens_per_s"] == sum(
        int((chunk["prompt_start_B"] + 2).sum()) for batch in (long, short) for chunk in batch.chunks
    )
