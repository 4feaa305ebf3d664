"""Checkpoints of runs that took no step: what a release is made of, without the time of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from agff.backbone_folder import backbone_sha256
from agff.checkpoint import save_checkpoint
from launcher.run.config_file import read_recipe
from launcher.run.model import untrained_model
from tests.agff.test_step import OPTIMIZER, zero_config

STEP = 4
"""By its name; no step was taken."""


def save_first_checkpoints(runs: Path, stages: Mapping[str, int]) -> None:
    """Of every run, a folder with a config.yaml, by its ZeRO stage, with weights that no run begins with."""
    from agff.engine import Engine, start_process_group

    device = start_process_group(dist.get_rank())
    for name, stage in stages.items():
        run = runs / name
        config = read_recipe(run / "config.yaml")
        torch.manual_seed(1)
        model = untrained_model(config, dtype=torch.float32, attention="sdpa")
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        engine = Engine(
            model,
            deepspeed_config=zero_config(stage, 8, clip=0.5),
            optimizer=OPTIMIZER,
            num_steps=STEP,
            autocast_dtype=None,
            device=device,
        )
        state = {"backbone_sha256": backbone_sha256(Path(config.backbone.path))}
        is_lora = config.backbone.lora is not None
        save_checkpoint(engine, run, step=STEP, state=state, trainable_only=is_lora)
        engine.deepspeed.destroy()
