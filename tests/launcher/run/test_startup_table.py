"""The table's numbers are those of the model that is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from launcher.command_line import parse_train_arguments
from launcher.run.config import ResolvedRun, RunConfig
from launcher.run.startup_table import count_parameters
from tests.agff.test_backbones import BUILDERS
from tests.agff.test_step import OPTIMIZER, zero_config
from tests.ranks import run_ranks

CHOICES = {
    "full": ["--prompts.num_fine", "0"],
    "lora": ["--backbone.lora.rank", "3", "--prompts.num_fine", "4"],
    "frozen vision": ["--backbone.freeze_vision", "true", "--prompts.tokens_per_prompt", "3"],
}


def config_of(folder: Path, choice: str) -> RunConfig:
    return parse_train_arguments(["--backbone.path", str(folder), *CHOICES[choice]]).config


def counted(root: Path) -> dict[tuple[str, str, int], tuple[tuple[int, int], tuple[int, int]]]:
    """By family, choice, ZeRO stage: (trainable, all) as the table says, and of the model in the engine."""
    from agff.engine import Engine, start_process_group
    from launcher.run.data import build_processor
    from launcher.run.model import build_model

    device = start_process_group(0)
    found = {}
    cases = [(family, choice, 1) for family in BUILDERS for choice in CHOICES]
    for family, choice, stage in [*cases, *(("qwen2_vl", choice, 3) for choice in CHOICES)]:
        config = config_of(root / family, choice)
        values: Any = {"config": config, "zero_stage": stage, "precision": "fp32"}
        run = cast(ResolvedRun, SimpleNamespace(**values, deepspeed=zero_config(stage, 8, 0.0)))
        engine = Engine(
            build_model(run, build_processor(config)),
            deepspeed_config=run.deepspeed,
            optimizer=OPTIMIZER,
            num_steps=4,
            autocast_dtype=None,
            device=device,
        )
        assert torch.nn.functional.linear is torch._C._nn.linear, (
            "DeepSpeed's would stay for all that follows"
        )
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.model.parameters()]
        built = (sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))
        found[family, choice, stage] = (count_parameters(config), built)
    return found


@pytest.mark.timeout(300)
def test_parameters_are_counted_as_they_are_built_from_the_folder(tmp_path: Path) -> None:
    for family, build in BUILDERS.items():
        build(tmp_path / family)
    found = run_ranks(counted, tmp_path, world_size=1)[0]
    assert {case: table for case, (table, _) in found.items()} == {
        case: built for case, (_, built) in found.items()
    }
    for family in BUILDERS:
        (full, everything), (lora, _), (frozen, _) = (found[family, choice, 1][0] for choice in CHOICES)
        assert full == everything
        assert 0 < lora < frozen < full
