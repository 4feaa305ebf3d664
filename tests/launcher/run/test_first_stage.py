"""A second stage begins where the release of the first one ends: weights, soft tokens, head."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agff.backbone_folder import backbone_sha256
from agff.errors import CheckpointError, ConfigError
from agff.objectives import OBJECTIVES
from agff.release import load
from agff.release_writer import save_release
from launcher.convert_checkpoint import main as convert_main
from launcher.run.config import RunConfig
from launcher.run.config_file import read_recipe
from launcher.run.first_stage import check_first_stage, first_stage_row, start_from_first_stage
from launcher.run.model import untrained_model
from launcher.train import main as train_main
from tests.agff.test_release import Projected, embedder
from tests.consolidated import consolidated_weights
from tests.drawings import tiny_backbone
from tests.launcher.runs import run_command, train_command
from tests.launcher.test_train import assert_same_tensors, tensors_of

pytestmark = pytest.mark.timeout(600)

STANDS_STILL = "--optimizer.learning_rate 1e-12"
"""A run whose weights stay those that it began with, in float32."""


@pytest.fixture(scope="module")
def first(project: Path, train_once: Callable[[int], tuple[Path, str]]) -> Path:
    """The release of the small project's run, named as a person names it."""
    release = project / "releases/first"
    assert convert_main([str(train_once(3)[0]), str(release)]) == 0
    return release


def second_stage(stage: int, run_dir: str, *options: str) -> str:
    chained = "--backbone.path releases/first --prompts.start_from releases/first"
    return " ".join([train_command(stage), chained, STANDS_STILL, f"--run_dir {run_dir}", *options])


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_second_stage_begins_with_the_first_one_s_release_and_resumes_bit_for_bit(
    project: Path, first: Path
) -> None:
    """Under ZeRO-3, where the released weights are partitioned while they are loaded."""
    command, run = second_stage(3, "runs/second"), project / "runs/second"
    result = run_command(command, project)
    assert result.returncode == 0, result.stdout
    assert "begins with          the soft tokens of releases/first\n" in result.stdout
    released, found = weights_of(load(first).model), consolidated_weights(run, step=4)
    assert released.keys() == found.keys()
    for name, weight in released.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-8, msg=name)
    before = load_file(project / ".cache/quickstart/backbone/model.safetensors")
    assert not torch.allclose(
        found["backbone.visual.blocks.0.attn.qkv.weight"], _of(before, "qkv"), atol=1e-4
    )
    state = json.loads((run / "checkpoints/step-000004/state.json").read_text())
    assert state["backbone_sha256"] == backbone_sha256(first / "backbone"), "it remembers what it began from"
    expected = tensors_of(run / "checkpoints/step-000004")
    (run / "checkpoints/step-000004").rename(run / "checkpoints/step-000004.partial")
    result = run_command(command, project)
    assert result.returncode == 0, result.stdout
    assert "2/4" in result.stdout, "it must continue at step 2"
    assert_same_tensors(tensors_of(run / "checkpoints/step-000004"), expected)


def _of(weights: dict[str, Tensor], part: str) -> Tensor:
    return next(weight for name, weight in sorted(weights.items()) if f"blocks.0.attn.{part}.weight" in name)


def test_adapters_on_a_release_know_it_again_and_are_released(project: Path, first: Path) -> None:
    """The third link: what is trained on the first stage's release is one as well."""
    result = run_command(second_stage(2, "runs/adapted", "--backbone.lora.rank 2"), project)
    assert result.returncode == 0, result.stdout
    out = project / "releases/adapted"
    result = run_command("python launcher/convert_checkpoint.py runs/adapted releases/adapted", project)
    assert result.returncode == 0, result.stdout
    found = weights_of(load(out).model)  # reproduces its golden vectors
    for name, weight in weights_of(load(first).model).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-8, msg=name)
    contract = json.loads((out / "agff_config.json").read_text())
    assert contract["origin"]["backbone"] == "first"
    assert contract["origin"]["backbone_sha256"] == backbone_sha256(first / "backbone")
    shutil.copytree(first, kept := project / "releases/kept")
    tiny_backbone(first / "backbone", seed=3)
    try:
        result = run_command("python launcher/convert_checkpoint.py runs/adapted releases/other", project)
    finally:
        shutil.rmtree(first)
        shutil.move(kept, first)
    assert result.returncode == 2
    assert "releases/first/backbone: these weights" in result.stdout
    assert "are not those that the adapters of" in result.stdout


@pytest.fixture
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return project


BACKBONE, PROMPTS = ("--backbone.path", "releases/first"), ("--prompts.start_from", "releases/first")


def dry_run(*options: str) -> int:
    recipe = ["--recipe", "launcher/recipes/quickstart.yaml"]  # the project's own
    return train_main([*recipe, *options, "--run_dir", "runs/none", "--dry-run"])


def test_the_backbone_of_a_release_serves_any_prompts(
    in_project: Path, first: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(*BACKBONE, "--prompts.num_fine", "2") == 0
    output = capfd.readouterr().out
    assert "releases/first, 0." in output
    assert "begins with" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [*PROMPTS, "--prompts.num_fine", "2"],
            "prompts.start_from=releases/first: its soft tokens are [5, 32] (num_fine 4, tokens_per_prompt "
            "1), those of this run [3, 32] (num_fine 2, tokens_per_prompt 1); set prompts.num_fine=4, or ",
        ),
        (
            [*PROMPTS, "--prompts.num_fine", "0", "--prompts.tokens_per_prompt", "4"],
            "those of this run [4, 32] (num_fine 0, tokens_per_prompt 4); set prompts.num_fine=4, "
            "prompts.tokens_per_prompt=1, or leave",
        ),
        (["--prompts.start_from", "releases/nowhere"], "releases/nowhere: no such folder; make one with"),
        (["--prompts.start_from", "runs"], "runs: no release here (agff_config.json is missing)"),
    ],
)
def test_soft_tokens_that_do_not_fit_are_refused_before_the_first_step(
    in_project: Path, first: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert dry_run(*options) == 2
    assert message in capfd.readouterr().err


def test_soft_tokens_of_another_width_are_refused(first: Path, project: Path, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "wide")
    save_file({"vectors": torch.zeros(5, 48)}, tmp_path / "wide/prompts.safetensors")
    contract = json.loads((tmp_path / "wide/agff_config.json").read_text())
    del contract["files"]["prompts.safetensors"]
    (tmp_path / "wide/agff_config.json").write_text(json.dumps(contract))
    config = recipe_of(first, [("prompts.start_from", str(tmp_path / "wide"))])
    with pytest.raises(
        ConfigError, match=r"are \[5, 48\] .* \[5, 32\] .*a release whose backbone is as wide"
    ):
        check_first_stage(config)


@pytest.mark.parametrize("options", [[*BACKBONE], [*PROMPTS]])
@pytest.mark.parametrize("file", ["prompts.safetensors", "backbone/config.json"])
def test_a_damaged_release_is_refused_as_a_first_stage(
    in_project: Path, first: Path, capfd: pytest.CaptureFixture[str], options: list[str], file: str
) -> None:
    before = (first / file).read_bytes()
    (first / file).write_bytes(before[:-1] + b" ")
    try:
        assert dry_run(*options) == 2
    finally:
        (first / file).write_bytes(before)
    assert f"{file}: " in capfd.readouterr().err


# ---------------------------------------------------------------- the head


@pytest.fixture
def with_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release of an objective whose head is part of the model."""
    monkeypatch.setitem(OBJECTIVES, "projected", Projected)
    backbone, objective = tiny_backbone(tmp_path / "backbone"), Projected(shared_width=12)
    trained = embedder(backbone, objective=objective)
    save_release(trained, tmp_path / "release", origin={})
    return tmp_path / "release"


RECIPE = Path(__file__).parents[3] / "launcher/recipes/quickstart.yaml"


def recipe_of(release: Path, overrides: list[tuple[str, str]]) -> RunConfig:
    values: dict[str, Any] = {"backbone.path": str(release), "data.shards": "none", **dict(overrides)}
    return read_recipe(RECIPE, list(values.items()))


def continued(release: Path, *overrides: tuple[str, str]) -> RunConfig:
    prompts = [("prompts.num_fine", "2"), ("prompts.start_from", str(release))]
    return recipe_of(release, [*prompts, *overrides])


def test_a_second_stage_continues_the_released_head_of_its_objective(with_head: Path) -> None:
    config = continued(with_head, ("objective", "projected"), ("loss.shared_width", "12"))
    check_first_stage(config)
    model = untrained_model(config, dtype=torch.float32, attention="sdpa")
    assert model.head is not None
    expected = load_file(with_head / "head.safetensors")
    assert not torch.equal(model.head.state_dict()["project.weight"], expected["project.weight"])
    start_from_first_stage(model, config)
    assert torch.equal(model.head.state_dict()["project.weight"], expected["project.weight"])
    assert model.prompted_embedding.vectors.requires_grad
    assert first_stage_row(config) == {"begins with": f"the soft tokens and the head of {with_head}"}


def test_another_objective_takes_the_soft_tokens_alone(with_head: Path) -> None:
    config = continued(with_head)
    check_first_stage(config)
    model = untrained_model(config, dtype=torch.float32, attention="sdpa")
    start_from_first_stage(model, config)
    assert model.head is None
    expected = load_file(with_head / "prompts.safetensors")["vectors"]
    assert torch.equal(model.prompted_embedding.vectors.detach(), expected)
    assert first_stage_row(config) == {"begins with": f"the soft tokens of {with_head}"}


def test_a_head_of_other_shapes_is_refused_with_both(with_head: Path) -> None:
    config = continued(with_head, ("objective", "projected"), ("loss.shared_width", "8"))
    with pytest.raises(
        ConfigError, match=r"project.weight is \[12, 32\] there, \[8, 32\] here; give the sett"
    ):
        check_first_stage(config)
    (with_head / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"head.safetensors: cannot read it"):
        check_first_stage(config)
