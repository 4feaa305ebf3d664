"""Steps of Qwen2-VL with LoRA at the published widths, through the training loop."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
import torch.distributed as dist

from agff.engine import start_process_group
from agff.flops import ModelFlops
from agff.processor import ProcessorConfig
from agff.trainer import StepReport, train
from launcher.quickstart.backbone import BackboneSizes, build_tiny_qwen2vl
from launcher.run.speed import SpeedMeter
from tests.benchmarks.steps import Setting, engine_of
from tests.benchmarks.synthetic import LIMITS, QUICK_SIZES

WARM_UP = 2
QWEN2_VL_2B = BackboneSizes(
    num_ranks=151_643,
    hidden=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    intermediate=8960,
    vision_hidden=1280,
    vision_layers=32,
    vision_heads=16,
    max_pixels=768 * 784,
    initializer_range=0.02,
)
"""Qwen/Qwen2-VL-2B-Instruct's widths."""
QWEN2_VL_7B = replace(QWEN2_VL_2B, hidden=3584, num_heads=28, num_kv_heads=4, intermediate=18944)
"""Qwen/Qwen2-VL-7B-Instruct's."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is trained, and on how much."""

    sizes: BackboneSizes
    pairs_per_rank: int
    num_chunks: int
    image_side: int
    """Of four images in five, in pixels; the fifth is twice as large."""
    limits: ProcessorConfig
    precision: str
    num_steps: int


def load_of(sizes: BackboneSizes, *, on_gpus: bool) -> Load:
    """64 pairs a GPU in chunks of 8 items, images of 144 and 576 tokens; or the least that a CPU can do."""
    if not on_gpus:
        return Load(
            sizes=QUICK_SIZES,
            pairs_per_rank=4,
            num_chunks=4,
            image_side=28,
            limits=LIMITS,
            precision="bf16",
            num_steps=1,
        )
    return Load(
        sizes=sizes,
        pairs_per_rank=64,
        num_chunks=16,
        image_side=336,
        limits=ProcessorConfig(max_tokens=1024, max_pixels=768 * 784),
        precision="bf16",
        num_steps=5,
    )


def speed_of_a_step(load: Load, folder: Path) -> dict[str, float]:
    """Medians of what the log shows of a step, by name: LoRA, frozen tower, gradient checkpointing, ZeRO-2.
    Collective."""
    device = start_process_group(dist.get_rank())
    if dist.get_rank() == 0:
        _write_backbone(folder, load.sizes, device)
    dist.barrier()
    setting = Setting(
        folder=folder,
        num_pairs=load.pairs_per_rank * dist.get_world_size(),
        with_lora=True,
        gradient_checkpointing=True,
        precision=load.precision,
        limits=load.limits,
        image_side=load.image_side,
    )
    run = setting.run(2, load.num_chunks)
    engine = engine_of(run)
    reports: list[StepReport] = []
    train(
        engine,
        run.config.loss,
        run.config.fusion,
        repeat(setting.batch(run)),
        start_step=0,
        num_steps=WARM_UP + load.num_steps,
        save_every=10**9,
        max_skipped_in_a_row=0,
        observe=reports.append,
        save=lambda step: None,
        after_step=lambda step: None,
        should_stop=lambda: False,
        mark=lambda what: None,
    )
    flops = ModelFlops.of_config(
        engine.model.backbone.config,
        run.config.backbone,
        run.config.prompts,
        keeps_vision=run.config.batch.keep_vision != "off",
        first_pass_chunks=engine.first_pass_chunks,
    )
    meter = SpeedMeter.of_device(flops, device, run.precision, memory=engine.feature_memory)
    values = [meter.measure(report) for report in reports[WARM_UP:]]
    return {name: statistics.median(value[name] for value in values) for name in values[0]}


def _write_backbone(folder: Path, sizes: BackboneSizes, device: torch.device) -> None:
    """Random weights in bf16, made on the device: a 7B model has 15 GB and takes a CPU minutes."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            build_tiny_qwen2vl(folder, seed=0, sizes=sizes)
    finally:
        torch.set_default_dtype(torch.float32)
