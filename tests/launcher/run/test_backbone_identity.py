"""Adapters stay with the weights they were trained on; a full run carries its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from agff.backbone_folder import backbone_sha256
from agff.errors import CheckpointError
from launcher.convert_checkpoint import main as convert_main
from launcher.evaluate import main as evaluate_main
from launcher.run.backbone_identity import backbone_of_run
from launcher.run.config import ResolvedRun
from launcher.run.trained_model import load_run
from launcher.train import main as train_main
from tests.agff.test_backbone_folder import reshard
from tests.drawings import tiny_backbone
from tests.launcher.runs import change_settings, run_command

pytestmark = pytest.mark.timeout(600)

ITEMS = ["one red circle top"]
STATE = "checkpoints/step-000004/state.json"
BACKBONE = ".cache/quickstart/backbone"


def with_backbone(run: Path, folder: Path, out: Path) -> Path:
    """A copy of the run whose backbone is in `folder`, as if that had always been its place."""
    shutil.copytree(run, out)
    change_settings(out, "backbone", path=str(folder))
    return out


@pytest.fixture
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return project


def test_adapters_on_another_backbone_are_refused_when_continued_converted_and_evaluated(
    in_project: Path, lora_run: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder holds another revision of the model, of the same shape."""
    command, trained = lora_run
    changed = tiny_backbone(tmp_path / "backbone", seed=1)
    run = with_backbone(trained, changed, tmp_path / "run")
    old, new = backbone_sha256(in_project / BACKBONE), backbone_sha256(changed)
    says = f"{changed}: these weights (sha256 {new:.12}...) are not those that the adapters of {run} were"
    assert convert_main([str(run), str(tmp_path / "release")]) == 2
    assert not (tmp_path / "release").exists()
    assert evaluate_main([str(run), "--mmvp", ".cache/quickstart/data/mmvp"]) == 2
    assert not (run / "scores.json").exists()
    command = command.replace("runs/lora ", f"{run} ") + f" --backbone.path {changed}"
    recipe = ["--recipe", "launcher/recipes/quickstart.yaml"]  # the project's own
    assert train_main([*recipe, *command.split()[2:], "--dry-run"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    for error in errors:
        assert says in error
        assert f"trained on (sha256 {old:.12}... in {run / STATE}" in error
        assert error.endswith("put the old weights back there, or train a new run on these")
    shutil.rmtree((run / STATE).parent)  # there are steps left to be trained
    before = sorted(path for path in run.rglob("*") if path.name != ".lock")
    result = run_command(command, in_project)
    assert result.returncode == 2, result.stdout
    assert result.stdout.count(says) == 1, "all ranks raise it, one says it"
    assert "Traceback" not in result.stdout
    assert sorted(path for path in run.rglob("*") if path.name != ".lock") == before


def test_the_same_weights_in_other_shards_are_the_same_backbone(
    in_project: Path, lora_run: tuple[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(BACKBONE, tmp_path / "backbone")
    reshard(tmp_path / "backbone")
    run = with_backbone(lora_run[1], tmp_path / "backbone", tmp_path / "run")
    found, expected = (load_run(folder)[0].encode(ITEMS) for folder in (run, lora_run[1]))
    assert torch.equal(found, expected)


def test_a_fully_tuned_run_does_not_depend_on_the_folder_s_weights(
    in_project: Path, train_once: Callable[[int], tuple[Path, str]], tmp_path: Path
) -> None:
    trained, _ = train_once(3)
    run = with_backbone(trained, tiny_backbone(tmp_path / "backbone", seed=1), tmp_path / "run")
    found, expected = (load_run(folder)[0].encode(ITEMS) for folder in (run, trained))
    assert torch.equal(found, expected)
    assert state_of(trained)["backbone_sha256"] == backbone_sha256(in_project / BACKBONE), "it began there"
    resolved = SimpleNamespace(
        run_dir=trained, config=SimpleNamespace(backbone=SimpleNamespace(path="gone", lora=None))
    )
    continued = backbone_of_run(cast(ResolvedRun, cast(Any, resolved)), start_step=4)
    assert continued == state_of(trained)["backbone_sha256"], "a continued run hands it on"


def state_of(run: Path) -> dict[str, Any]:
    return json.loads((run / STATE).read_text())


def test_a_checkpoint_of_an_older_version_says_what_to_write_into_it(
    in_project: Path, lora_run: tuple[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run[1], run)
    state = state_of(run)
    recorded = state.pop("backbone_sha256")
    (run / STATE).write_text(json.dumps(state))
    with pytest.raises(
        CheckpointError, match="does not say which backbone its adapters were trained on"
    ) as caught:
        load_run(run)
    addition = str(caught.value).partition(" add ")[2].removesuffix(" to that file")
    assert json.loads(f"{{{addition}}}") == {"backbone_sha256": recorded}
    (run / STATE).write_text(json.dumps(state | json.loads(f"{{{addition}}}")))
    load_run(run)
