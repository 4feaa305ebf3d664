"""A run of every objective becomes a release: without what served the training alone, loaded without
DeepSpeed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from agff.backbone_folder import HEAD_FILE
from agff.contract import read_contract
from agff.objectives import OBJECTIVES
from agff.objectives.nested import truncations_of
from agff.objectives.objective import Objective
from agff.release import golden_items
from launcher.convert_checkpoint import convert
from launcher.run.config_file import read_recipe
from launcher.run.model import untrained_model
from launcher.run.trained_model import load_run
from tests.agff.test_every_objective import case_of, optional
from tests.consolidated import consolidated_weights
from tests.drawings import tiny_backbone
from tests.launcher.first_checkpoints import save_first_checkpoints
from tests.launcher.runs import REPOSITORY, SMALL_RECIPE
from tests.ranks import run_ranks

RUNS = [f"{name}-{tuning}" for name in OBJECTIVES for tuning in ("full", "lora")]


def loss_of(name: str) -> Objective:
    """The case's settings; a case may be of a class of its own."""
    cls, given = OBJECTIVES[name], case_of(name).OBJECTIVE
    return cls(**{each.name: getattr(given, each.name) for each in dataclasses.fields(cls)})


def write_run(folder: Path, backbone: Path, name: str, *, lora: bool) -> None:
    recipe: dict[str, Any] = {**SMALL_RECIPE, "objective": name, "precision": "fp32"}
    recipe |= {"prompts": {"num_fine": optional(name, "NUM_FINE", 2)}}
    recipe |= {"backbone": {"path": str(backbone), "lora": {"rank": 2} if lora else None}}
    recipe |= {"loss": dataclasses.asdict(loss_of(name))}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every_release")
    backbone = tiny_backbone(folder / "backbone")
    for name in RUNS:
        write_run(folder / name, backbone, name.partition("-")[0], lora=name.endswith("lora"))
    run_ranks(save_first_checkpoints, folder, dict.fromkeys(RUNS, 2), world_size=1)
    return folder


@pytest.fixture(scope="module")
def releases(runs: Path) -> Path:
    """Also the smallest layers of these tiny models are filled only while they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agff.streamed_model.RESIDENT_ELEMENTS", 0)
        for name in RUNS:
            convert(runs / name, runs / "releases" / name, dtype=torch.float32)
    return runs / "releases"


LOAD_ALL = """
import sys
from pathlib import Path
sys.modules["deepspeed"] = None
from safetensors.torch import save_file
import agff
from agff.release import golden_items
found = {path.name: agff.load(path).encode(list(golden_items().values())) for path in Path(sys.argv[1]).iterdir()}
assert sys.modules["deepspeed"] is None
save_file(found, sys.argv[2])
"""  # noqa: E501


@pytest.fixture(scope="module")
def loaded(releases: Path) -> dict[str, Tensor]:
    """The vectors of every release in a process without DeepSpeed; `agff.load` compares them with the golden
    ones."""
    out = releases.parent / "vectors.safetensors"
    command = [sys.executable, "-c", LOAD_ALL, str(releases), str(out)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    return load_file(out)


@pytest.mark.parametrize("name", RUNS)
def test_it_loads_without_deepspeed_and_makes_the_vectors_of_the_run(
    runs: Path, loaded: dict[str, Tensor], name: str
) -> None:
    trained, _ = load_run(runs / name)
    expected = trained.encode(list(golden_items().values()))
    # merged adapters sum in another order
    torch.testing.assert_close(loaded[name], expected, rtol=0, atol=1e-5)
    assert (loaded[name][0] - loaded[name][1]).norm(dim=-1).min() > 0.01, "the items differ"


@pytest.mark.parametrize("name", RUNS)
def test_a_head_that_serves_the_training_alone_is_dropped(runs: Path, releases: Path, name: str) -> None:
    objective = loss_of(name.partition("-")[0])
    config = read_recipe(runs / name / "config.yaml")
    head = untrained_model(config, dtype=torch.float32, attention="sdpa").head
    is_released = head is not None and head.is_released
    trained = {key for key in consolidated_weights(runs / name, step=4) if key.startswith("head.")}
    assert trained == {f"head.{key}" for key, _ in (head.named_parameters() if head is not None else ())}
    contract, path = read_contract(releases / name), releases / name / HEAD_FILE
    assert path.exists() == is_released
    assert contract.objective == (name.partition("-")[0] if is_released else None)
    assert contract.nested == truncations_of(objective)
    released = [
        key
        for file in (releases / name).rglob("*.safetensors")
        if file != path
        for key in safe_open(file, framework="pt").keys()  # noqa: SIM118
    ]
    assert len(released) > 20
    assert [key for key in released if "head." in key or "decoder" in key or "lora" in key] == []


def test_objectives_of_both_kinds_are_among_them(releases: Path) -> None:
    kinds = {(releases / name / HEAD_FILE).exists() for name in RUNS}
    assert kinds == {True, False}
    assert any(loss_of(name).build_head(_config(releases)) is not None for name in ("mac", "vein"))


def _config(releases: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(releases.parent / "backbone")
