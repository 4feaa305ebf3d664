"""A release is the checkpoint, weight by weight; and what cannot become one is refused with its reason."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import agff
from agff import lazy_tensor
from agff.backbone import load_backbone
from agff.backbone_folder import backbone_sha256
from agff.checkpoint_folder import checkpoint_folder, checkpoint_name
from agff.contract import CONTRACT_FILE, read_contract
from agff.lazy_tensor import LazyTensor, of_tensor
from agff.release_check import check_golden_streamed
from agff.release_parts import ReleaseParts, release_parts
from agff.release_weights import WrittenWeights, check_written
from agff.zero_weights import ZeroWeights
from data_pipeline.manifest import read_manifest
from data_pipeline.storage import LocalFolder
from launcher.convert_checkpoint import convert, main
from tests.consolidated import consolidated_weights
from tests.launcher.runs import change_settings

pytestmark = pytest.mark.timeout(600)

BACKBONE = ".cache/quickstart/backbone"


def backbone_weights(folder: Path) -> dict[str, Tensor]:
    """Of a backbone, or of a release without the rows that its prompts have in the vocabulary."""
    weights: dict[str, Tensor] = load_backbone(folder, dtype=torch.float32, attention="sdpa").state_dict()
    if (mask := folder.parent / "1_MultiVectorMask/config.json").exists():
        [table] = [name for name in weights if name.endswith("embed_tokens.weight")]
        first = min(json.loads(mask.read_text())["keep_only_token_ids"])
        assert len(weights[table]) == first + 5, "the table had no unused rows"
        weights[table] = weights[table][:first]
    return weights


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
    for path, says in {
        "/nowhere/backbone": "no such folder; if the backbone moved, write its new place there",
        "models/backbone": f"no such folder in {tmp_path}, and the path is relative to the folder in which",
        str(project / BACKBONE): "",
    }.items():
        change_settings(run, "backbone", path=path)
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
    change_settings(run, "prompts", num_fine=2)
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


def test_a_disk_that_fails_when_it_is_synced_is_named_and_leaves_nothing(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def sync(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.chdir(project)
    monkeypatch.setattr("launcher.convert_checkpoint.sync", sync)
    assert main([str(train_once(3)[0]), str(tmp_path / "release")]) == 2
    assert "release: cannot be written: [Errno 5] Input/output error" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "3"], "no complete checkpoint of step 3; there are those of 2, 4"),
        (["--lora", "adapter"], "--lora adapter: the model has no adapters, all of its weights were trained"),
        (["--lora", "both"], "--lora both: the model has no adapters, all of its weights were trained"),
        (["--universal", "nowhere"], "nowhere: no such folder; name one that ds_to_universal has made"),
        (["--universal", "."], ".: no checkpoint of ZeRO 1, 2 or 3 (0 files *_optim_states.pt, 0"),
    ],
)
def test_what_a_run_does_not_have_is_refused_and_leaves_nothing(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(project)
    assert main([str(train_once(3)[0]), str(tmp_path / "release"), *options]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["5 pears", "0", "-1GB", "GB"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "release", f"--shard_size={size}"])
    assert f"'{size}' is no size; write it as 500MB or 5GB" in capsys.readouterr().err


def test_an_older_step_is_released_in_shards_that_transformers_loads(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    run = train_once(3)[0]
    assert main([str(run), str(tmp_path / "old"), "--step", "2", "--shard_size", "100KB"]) == 0
    assert main([str(run), str(tmp_path / "new")]) == 0
    folder = tmp_path / "old" / "backbone"
    shards = sorted(folder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 1
    found, saved = backbone_weights(folder), consolidated_weights(run, step=2)
    for name, weight in found.items():
        inner = name.replace("embed_tokens.", "embed_tokens.base.")
        assert torch.equal(weight, saved[f"backbone.{inner}"])
    newer = backbone_weights(tmp_path / "new" / "backbone")
    assert any(not torch.equal(found[name], newer[name]) for name in found)
    assert read_contract(tmp_path / "old").origin["step"] == 2
    agff.load(tmp_path / "old")


DAMAGES = ["a tensor of the checkpoint", "a tensor on the disk", "a layer", "an adapter of zeros"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_the_checkpoint_is_never_released(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    lora_run: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    """A bit of the masters; a bit of what was written; one layer that is another's, which no hash of what was
    written shows; adapters that were saved before they were gathered."""
    monkeypatch.chdir(project)
    run, out = tmp_path / "run", tmp_path / "out" / "release"
    shutil.copytree(lora_run[1] if damage == "an adapter of zeros" else train_once(3)[0], run)
    step = checkpoint_folder(run) / checkpoint_name(4)
    pieces = ZeroWeights(step).pieces
    if damage == "a tensor of the checkpoint":
        _flip(pieces[3].path, pieces[3].start)
        says = [f"{pieces[3].path}: damaged: Bad CRC-32", "convert an older one with --step 2"]
    elif damage == "an adapter of zeros":
        monkeypatch.setattr("agff.zero_weights.of_pieces", _zeros)
        says = ["adapters are zero: the model is the backbone as it was; nothing was trained"]
    elif damage == "a tensor on the disk":
        monkeypatch.setattr("launcher.convert_checkpoint.check_written", _check_damaged)
        says = ["read back differs from what was written: CRC-32 ", "nothing was released"]
    else:
        monkeypatch.setattr("agff.release_writer.release_parts", _with_another_layer)
        says = ["does not reproduce its golden vectors: cosine"]
    assert main([str(run), str(out)]) == 2
    errors = capsys.readouterr().err
    assert all(each in errors for each in says), errors
    assert list(out.parent.iterdir()) == []


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _check_damaged(written: WrittenWeights) -> None:
    for path in written.tensors:
        _flip(path, path.stat().st_size - 5)
    check_written(written)


def _zeros(shape: torch.Size, _: Any) -> LazyTensor:
    return of_tensor(torch.zeros(shape))


def _with_another_layer(*arguments: Any) -> ReleaseParts:
    parts = release_parts(*arguments)
    name = next(name for name in parts.backbone if name.endswith("layers.0.mlp.down_proj.weight"))
    parts.backbone[name] = of_tensor(parts.backbone[name].read().flip(0))
    return parts


def test_of_two_writers_of_a_folder_one_is_refused(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other one is done first."""
    monkeypatch.chdir(project)
    run, out = train_once(3)[0], tmp_path / "release"
    convert_other = partial(convert, run, tmp_path / "other", dtype=torch.float32)

    def check_and_be_overtaken(*arguments: Any, **options: Any) -> float:
        monkeypatch.undo()
        monkeypatch.chdir(project)
        convert_other()
        (tmp_path / "other").rename(out)
        return check_golden_streamed(*arguments, **options)

    monkeypatch.setattr("launcher.convert_checkpoint.check_golden_streamed", check_and_be_overtaken)
    assert main([str(run), str(out)]) == 2
    assert f"{out} exists by now: another process has written it meanwhile" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    agff.load(out)


def test_nothing_but_a_tensor_or_two_is_in_memory(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes of all tensors that live at once, counted where they are made, against the largest tensor. In
    numpy's memory, which shows when it is given back: a tensor's may outlive its object."""
    monkeypatch.chdir(project)
    alive: dict[int, int] = {}
    most = [0]

    def read(shape: torch.Size, pieces: Any) -> Tensor:
        memory = original(shape, pieces).numpy().copy()
        alive[id(memory)] = memory.nbytes
        weakref.finalize(memory, alive.pop, id(memory))
        most[0] = max(most[0], sum(alive.values()))
        return torch.from_numpy(memory)

    original = lazy_tensor._read
    monkeypatch.setattr(lazy_tensor, "_read", read)
    monkeypatch.setattr("agff.streamed_model.RESIDENT_ELEMENTS", 64)  # no more than a norm of this tiny model
    run = train_once(3)[0]
    convert(run, tmp_path / "release", dtype=torch.float32)
    sizes = [
        lazy.shape.numel() * 4
        for lazy in ZeroWeights(checkpoint_folder(run) / checkpoint_name(4)).tensors.values()
    ]
    assert len(sizes) > 40
    assert sum(sizes) > 3 * max(sizes), "the bound says something"
    assert most[0] <= 2 * max(sizes)
