"""What may change when a run is continued; and that every setting which the code names exists."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from agff.objectives import OBJECTIVES
from agff.zero3 import fill_in
from launcher.command_line import RECIPES, parse_train_arguments
from launcher.run.changes import (
    DECIDE_THE_ORDER,
    FOLLOW_FROM_OTHERS,
    MAY_CHANGE_ON_RESUME,
    differences,
)
from launcher.run.config import as_dict, resolve, run_config_of
from launcher.run.config_file import MOVED, PATHS
from launcher.run.deepspeed_json import FILLED_IN, MECHANISM, UNSAFE_WRITERS, read_deepspeed_json
from launcher.run.hardware import Hardware
from launcher.run.typed_values import setting_names
from tests.launcher.runs import REPOSITORY

SETTINGS = setting_names(run_config_of("contrastive"))


def stored() -> dict[str, Any]:
    """All settings, an optional section included."""
    return as_dict(parse_train_arguments(["--backbone.lora.rank", "4"]).config)


def leaves() -> list[str]:
    sections = {name.rpartition(".")[0] for name in SETTINGS}
    return [name for name in SETTINGS if name not in sections]


def changed(name: str) -> dict[str, Any]:
    values = copy.deepcopy(stored())
    *sections, key = name.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    assert key in inner
    inner[key] = "another value"
    return values


@pytest.mark.parametrize("name", leaves())
def test_a_setting_may_change_on_resume_or_is_refused(name: str) -> None:
    found = differences(stored(), changed(name))
    if name in (*MAY_CHANGE_ON_RESUME, *DECIDE_THE_ORDER):
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(f"{name}: ")


@pytest.mark.parametrize("names", [MAY_CHANGE_ON_RESUME, DECIDE_THE_ORDER, PATHS, tuple(MOVED.values())])
def test_lists_of_settings_name_settings_that_exist(names: tuple[str, ...]) -> None:
    assert names
    assert [name for name in names if name not in leaves()] == []


def test_settings_that_moved_are_gone() -> None:
    assert [name for name in MOVED if name in SETTINGS] == []


@pytest.fixture(scope="module")
def deepspeed_source() -> str:
    folders = ("runtime", "monitor", "comm", "profiling", "utils", "compile", "nebula", "datastates")
    paths = [path for name in folders for path in (Path(deepspeed.__file__).parent / name).rglob("*.py")]
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@pytest.mark.parametrize("key", [*FILLED_IN, *UNSAFE_WRITERS, *MECHANISM, *MECHANISM["flops_profiler"]])
def test_keys_of_the_deepspeed_json_are_read_by_deepspeed(key: str, deepspeed_source: str) -> None:
    assert re.search(rf"""["']{key}["']|^ +{key}: """, deepspeed_source, re.MULTILINE)


def test_no_key_is_both_ours_and_the_file_s() -> None:
    assert set(MECHANISM).isdisjoint((*FILLED_IN, *UNSAFE_WRITERS))


def test_what_follows_from_the_batch_is_in_the_resolved_configuration() -> None:
    values = read_deepspeed_json(REPOSITORY / "ds_configs/zero3.json")
    hardware = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=False)
    config = parse_train_arguments([]).config
    run = resolve(config, values, deepspeed_name="zero3", world_size=2, hardware=hardware)
    batch_sizes = [name.partition(".")[2] for name in FOLLOW_FROM_OTHERS if "zero_optimization" not in name]
    assert [name for name in batch_sizes if name not in run.deepspeed] == []
    sizes = [name.rpartition(".")[2] for name in FOLLOW_FROM_OTHERS if "zero_optimization" in name]
    filled_in = fill_in(run.deepspeed, torch.nn.Linear(2, 2))["zero_optimization"]
    assert [name for name in sizes if name not in filled_in] == []
    assert run.deepspeed.keys() & set(FILLED_IN) == {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "bf16",
        "steps_per_print",
    }


TEXTS = [
    *(
        path
        for package in ("agff", "data_pipeline", "launcher")
        for path in (REPOSITORY / package).rglob("*.py")
    ),
    *RECIPES.glob("*.yaml"),
    *(REPOSITORY / "slurm").glob("*.sh"),
]
SECTIONS = "|".join(sorted({name.split(".")[0] for name in SETTINGS if "." in name}))


def test_settings_named_in_messages_and_scripts_exist() -> None:
    """`--data.accept_changes`, and `batch.chunk_size={...} must be >= 1`."""
    patterns = [r"--([a-z_]+(?:\.[a-z_]+)+)\b(?!\.)", rf"[\"' ]((?:{SECTIONS})(?:\.[a-z_]+)+)=\{{"]
    named = {
        (name, path.name)
        for path in TEXTS
        for pattern in patterns
        for name in re.findall(pattern, path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    known = {name for objective in OBJECTIVES for name in setting_names(run_config_of(objective))}
    assert [f"{file} names {name}" for name, file in sorted(named) if name not in known] == []
