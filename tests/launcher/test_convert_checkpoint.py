"""A release is the checkpoint, weight by weight; and what cannot become one is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agff.backbone import load_backbone
from agff.backbone_folder import backbone_sha256
from agff.checkpoint import consolidated_weights
from agff.contract import CONTRACT_FILE
from data_pipeline.manifest import read_manifest
from data_pipeline.storage import LocalFolder
from launcher.convert_checkpoint import main

pytestmark = pytest.mark.timeout(600)

BACKBONE = ".cache/quickstart/backbone"


def backbone_weights(folder: Path) -> dict[str, Tensor]:
    return load_backbone(folder, dtype=torch.float32, attention="sdpa").state_dict()


def from_checkpoint(run: Path, base: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """(the backbone's weights under transformers' names, the soft tokens), by hand from the ZeRO partitions:
    adapters of rank 2 and alpha 16 are added as W + 8 B A."""
    saved = consolidated_weights(run, step=4)
    adapters = [name for name in saved if name.endswith("lora_A.default.weight")]
    if adapters:
        weights = dict(base)
        for name in adapters:
            plain = name.removeprefix("backbone.base_model.model.").replace(".lora_A.default", "")
            weights[plain] = base[plain] + 8 * saved[name.replace("lora_A", "lora_B")] @ saved[name]
    else:
        weights = {
            name.removeprefix("backbone.").replace("embed_tokens.base.", "embed_tokens."): weight
            for name, weight in saved.items()
            if not name.endswith("embed_tokens.vectors")
        }
    return weights, next(weight for name, weight in saved.items() if name.endswith("embed_tokens.vectors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_release_equals_the_checkpoint_weight_by_weight(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    lora_run: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    dtype: str,
) -> None:
    monkeypatch.chdir(project)
    run = lora_run[1] if kind == "lora" else train_once(3)[0]
    release = tmp_path / "release"
    assert main([str(run), str(release), "--dtype", dtype]) == 0, capsys.readouterr().err
    assert "every weight read back equal, vectors as the checkpoint's: cosine >= " in capsys.readouterr().out
    base = backbone_weights(project / BACKBONE)
    expected, prompts = from_checkpoint(run, base)
    found = backbone_weights(release / "backbone")
    assert found.keys() == base.keys()
    # bfloat16 keeps 8 bits; a merged sum may round to the neighbour
    tolerance = {"rtol": 2**-7 if kind == "lora" else 0, "atol": 1e-6 if kind == "lora" else 0}
    if dtype == "float32":
        tolerance["rtol"] = 1e-5 * (kind == "lora")
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name].to(getattr(torch, dtype)).float(), **tolerance)
    assert any(not torch.equal(expected[name], base[name]) for name in base), "training moved the backbone"
    stored = load_file(release / "prompts.safetensors")["vectors"]
    assert torch.equal(stored, prompts.to(getattr(torch, dtype)))
    contract = json.loads((release / CONTRACT_FILE).read_text())
    assert contract["nested"] == {"dims": [8] * (kind == "lora"), "fine": [0] * (kind == "lora")}
    origin = contract["origin"]
    assert (origin["step"], origin["objective"]) == (4, "contrastive")
    assert origin["backbone_sha256"] == backbone_sha256(project / BACKBONE)
    manifest = read_manifest(LocalFolder(project / ".cache/quickstart/shards"))
    assert origin["data"] == {
        name: {"samples": source.num_samples, "shards": source.fingerprint}
        for name, source in manifest.sources.items()
    }
    assert origin["backbone_license"] == "not recorded"
    assert origin["settings"]["optimizer.learning_rate"] == 1e-3
    assert ("backbone.lora.rank" in origin["settings"]) == (kind == "lora")
    assert str(project) not in json.dumps(origin), "a path of this machine"
    card = (release / "README.md").read_text()
    assert all(source["shards"] in card for source in origin["data"].values())
    assert "| `optimizer.learning_rate` | `0.001` |" in card


def test_a_run_is_converted_from_another_working_folder(
    project: Path,
    lora_run: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the absolute path of the backbone; one that is gone or relative names the file to edit."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(lora_run[1], run)
    values = yaml.safe_load((run / "config.yaml").read_text())
    for path, says in {
        "/nowhere/backbone": "no such folder; if the backbone moved, write its new place there",
        "models/backbone": f"no such folder in {tmp_path}, and the path is relative to the folder in which",
        str(project / BACKBONE): "",
    }.items():
        values["backbone"]["path"] = path
        (run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        assert main([str(run), "release"]) == (2 if says else 0)
        errors = capsys.readouterr().err
        assert "Repo id" not in errors
        if says:
            assert f"error: {run / 'config.yaml'}: backbone.path={path}: {says}" in errors
    assert (tmp_path / "release" / CONTRACT_FILE).exists()


def test_a_checkpoint_of_another_model_names_the_weights(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    run = tmp_path / "run"
    shutil.copytree(train_once(3)[0], run)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["prompts"]["num_fine"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert main([str(run), str(tmp_path / "release")]) == 2
    assert "embed_tokens.vectors is [5, 32], in the model [3, 32]; the backbone" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "no-run"), str(tmp_path / "file/release")]) == 2
    assert f"error: {tmp_path}/file/release: cannot be written: " in capsys.readouterr().err


def test_what_cannot_be_released_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no-run"), str(tmp_path / "release")]) == 2
    assert "no-run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_named_and_leaves_nothing(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def save(*_: object, **__: object) -> None:
        raise error

    monkeypatch.chdir(project)
    monkeypatch.setattr("agff.release.save_file", save)
    assert main([str(train_once(3)[0]), str(tmp_path / "release")]) == 2
    assert "release: cannot be written: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
