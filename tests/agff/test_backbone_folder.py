"""The fingerprint of a backbone's weights, and folders that are no backbone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agff import backbone_folder
from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.backbone_folder import backbone_sha256, check_backbone_folder
from agff.errors import ConfigError
from tests.drawings import tiny_backbone

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("folder") / "backbone")


def reshard(folder: Path) -> None:
    """Two files and an index; the tensors of a file in another order, and metadata beside them."""
    weights = load_file(folder / WEIGHTS)
    shards: dict[str, dict[str, torch.Tensor]] = {"second.safetensors": {}, "first.safetensors": {}}
    for position, name in enumerate(sorted(weights, reverse=True)):
        shards[("first", "second")[position % 2] + ".safetensors"][name] = weights[name]
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt", "by": "us"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def name_in_index(folder: Path, name: str) -> None:
    """In place of first.safetensors."""
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("first.safetensors", name))


def test_the_same_weights_in_other_shards_have_the_same_fingerprint(backbone: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(backbone, copy)
    expected = backbone_sha256(backbone)
    assert len(expected) == 64
    assert backbone_sha256(copy) == expected
    reshard(copy)
    assert backbone_sha256(copy) == expected
    # what lies there too and is not loaded does not count
    save_file({"x": torch.zeros(1)}, copy / "consolidated.safetensors")
    (copy / "README.md").write_text("changed")
    assert backbone_sha256(copy) == expected


def one_bit(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name].view(torch.uint8).view(-1)[-1] ^= 1


def swapped(weights: dict[str, torch.Tensor], name: str) -> None:
    other = name.replace("layers.0", "layers.1")
    assert other != name
    weights[name], weights[other] = weights[other], weights[name]


CHANGES: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "one bit": one_bit,
    "two layers swapped": swapped,
    "another shape": lambda weights, name: weights.update({name: weights[name].reshape(-1)}),
    "another dtype": lambda weights, name: weights.update({name: weights[name].view(torch.int32)}),
    "another name": lambda weights, name: weights.update({f"{name}s": weights.pop(name)}),
    "one tensor more": lambda weights, name: weights.update(scale=torch.tensor(1.0)),
    "one tensor less": lambda weights, name: weights.pop(name),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_have_another_fingerprint(backbone: Path, tmp_path: Path, change: str) -> None:
    weights = load_file(backbone / WEIGHTS)
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    CHANGES[change](weights, name)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert backbone_sha256(tmp_path) != backbone_sha256(backbone)


def test_every_dtype_and_an_empty_tensor_are_hashed(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64)
    tensors = {str(dtype): torch.zeros(2, 3).to(dtype) for dtype in dtypes}
    save_file({**tensors, "empty": torch.zeros(0, 4), "scalar": torch.tensor(1)}, tmp_path / WEIGHTS)
    assert len(backbone_sha256(tmp_path)) == 64


def test_a_pickle_is_hashed_as_a_file(backbone: Path, tmp_path: Path) -> None:
    """Without being opened."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    first = backbone_sha256(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert backbone_sha256(tmp_path) != first


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), r"backbone: no weights here"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99),
            r"model\.safetensors: cannot read the weights",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
            r"model\.safetensors: cannot read the weights",
        ),
        (
            lambda folder: (reshard(folder), (folder / "second.safetensors").unlink()),
            r"second\.safetensors: missing, .*\n.* 1 of 2 files of weights missing",
        ),
        (
            lambda folder: (reshard(folder), (folder / f"{WEIGHTS}.index.json").write_text("[]")),
            r"index\.json: not an index of weights",
        ),
        (
            lambda folder: (reshard(folder), (folder / f"{WEIGHTS}.index.json").write_text("{")),
            r"index\.json: not an index of weights",
        ),
        (
            lambda folder: (reshard(folder), name_in_index(folder, "../backbone/first.safetensors")),
            r"index\.json: names weights outside of its folder, '\.\./backbone/first\.safetensors'",
        ),
        (
            lambda folder: (reshard(folder), name_in_index(folder, str(folder / "first.safetensors"))),
            r"index\.json: names weights outside of its folder, '/",
        ),
    ],
)
def test_weights_that_cannot_be_read_are_named(
    backbone: Path, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    shutil.copytree(backbone, tmp_path / "backbone")
    damage(tmp_path / "backbone")
    with pytest.raises(ConfigError, match=says) as caught:
        backbone_sha256(tmp_path / "backbone")
    assert "download" in str(caught.value)


def test_no_weights_outside_of_the_folder_are_loaded(backbone: Path, tmp_path: Path) -> None:
    """transformers would follow the index."""
    folder = tmp_path / "backbone"
    shutil.copytree(backbone, folder)
    reshard(folder)
    (folder / "first.safetensors").rename(tmp_path / "first.safetensors")
    name_in_index(folder, "../first.safetensors")
    with pytest.raises(ConfigError, match="names weights outside of its folder"):
        load_backbone(folder, dtype=torch.float32, attention="sdpa")


# ------------------------------------------------------------------ folders that are no backbone


def test_a_mistyped_path_is_answered_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models/Qwen2-VL-2B", "models/Qwen2-VL-7B", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/Qwen2-VL.txt").touch()
    monkeypatch.chdir(tmp_path)
    for mistyped, near in {
        "models/Qwn2-VL-2B": "models/Qwen2-VL-2B",
        "modls/Qwen2-VL-2B": "models",
        "models/Qwen2-VL-2B/backbon/x": None,
        "Qwen/Qwen2-VL-2B-Instruct": None,  # a name on the hub
        "models/Qwen2-VL.txt": "models/Qwen2-VL",
    }.items():
        for ask in (check_backbone_folder, lambda f: load_backbone(f, dtype=torch.float32, attention="sdpa")):
            with pytest.raises(ConfigError, match=r"backbone\.path is a local folder") as caught:
                ask(Path(mistyped))
            text = str(caught.value)
            assert text.startswith(f"{mistyped}: no such folder")
            assert f"hf download REPOSITORY --local-dir {mistyped}" in text
            assert "Repo id" not in text
            assert (f"did you mean {tmp_path / near}" in text) if near else ("did you mean" not in text)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a backbone folder \(config.json is missing\)"):
        check_backbone_folder(tmp_path)


@pytest.fixture(scope="module")
def adapter(backbone: Path) -> Path:
    """What LoRA training leaves, saved by peft: adapter_config.json and its weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = choose_trainable(
            load_backbone(backbone, dtype=torch.float32, attention="sdpa"),
            BackboneConfig(path=str(backbone), lora=LoraConfig(rank=2)),
        )
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.peft_config["default"].base_model_name_or_path = str(backbone)
        adapted.save_pretrained(backbone.parent / "adapter")
        adapted.merge_and_unload().save_pretrained(backbone.parent / "expected")
    return backbone.parent / "adapter"


def put_beside(adapter: Path, folder: Path) -> None:
    for file in adapter.glob("adapter*"):
        shutil.copy(file, folder)


def test_an_adapter_beside_the_backbone_is_refused_and_the_command_merges_it(
    backbone: Path, adapter: Path, tmp_path: Path
) -> None:
    """transformers would load it unasked and freeze the backbone: "full tuning" would train nothing of it."""
    folder = tmp_path / "my backbone"  # a name to be quoted
    shutil.copytree(backbone, folder)
    put_beside(adapter, folder)
    with pytest.raises(ConfigError, match=r"lies beside the backbone.*not merged") as caught:
        load_backbone(folder, dtype=torch.float32, attention="sdpa")
    text = str(caught.value)
    move = text.partition("move it away: ")[2].splitlines()[0]
    merge = text.splitlines()[-1]
    subprocess.run(["bash", "-c", move], check=True)
    check_backbone_folder(folder)
    done = subprocess.run(
        ["bash", "-c", merge.replace("python", sys.executable, 1)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "my backbone-merged"
    assert f"give {merged}, made by" in text
    assert sorted(path.name for path in merged.iterdir()) == sorted(path.name for path in backbone.iterdir())
    states = [
        load_backbone(path, dtype=torch.float32, attention="sdpa").state_dict()
        for path in (backbone, backbone.parent / "expected", merged)
    ]
    before, expected, found = states
    assert expected.keys() == found.keys()
    changed = [name for name in expected if not torch.equal(before[name], expected[name])]
    assert len(changed) == 14, "seven linear layers of two decoder layers"
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


def test_an_adapter_alone_names_its_base(backbone: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json\) without a backbone") as caught:
        check_backbone_folder(adapter)
    assert f"Give {backbone}, or merge the adapter and give {adapter}-merged: python -c" in str(caught.value)
    assert "t.Qwen2VLModel.from_pretrained(base)" in str(caught.value)


def unmerged_stages(backbone: Path, adapter: Path, tmp_path: Path) -> dict[str, Path]:
    """What somebody may give of a first stage whose adapter is not merged, by what it is."""
    run = tmp_path / "runs" / "first stage"
    checkpoint = run / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    beside, weights_only, among = (tmp_path / name for name in ("beside", "weights only", "among"))
    for folder in (beside, weights_only, among):
        shutil.copytree(backbone, folder)
    put_beside(adapter, beside)
    shutil.copy(adapter / "adapter_model.safetensors", weights_only)
    weights = load_file(among / WEIGHTS)
    save_file(weights | load_file(adapter / "adapter_model.safetensors"), among / WEIGHTS)
    return {
        "the run": run,
        "its checkpoints": checkpoint.parent,
        "a checkpoint": checkpoint,
        "an adapter beside the weights": beside,
        "an adapter without its configuration": weights_only,
        "an adapter among the weights": among,
        "an adapter alone": adapter,
    }


KINDS = ["the run", "its checkpoints", "a checkpoint", "an adapter beside the weights",
    "an adapter without its configuration", "an adapter among the weights", "an adapter alone"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_stage_that_is_not_merged_is_refused_with_the_command_that_merges_it(
    backbone: Path, adapter: Path, tmp_path: Path, kind: str
) -> None:
    folders = unmerged_stages(backbone, adapter, tmp_path)
    assert list(folders) == KINDS
    inside = folders["the run"] / "release" / "backbone"
    shutil.copytree(backbone, inside)
    check_backbone_folder(inside)
    with pytest.raises(ConfigError) as caught:
        check_backbone_folder(folders[kind])
    text = str(caught.value)
    assert text.startswith(f"{folders[kind]}: ")
    run = f"'{folders['the run']}'" if kind in KINDS[:3] else "RUN"
    assert f"launcher/convert_checkpoint.py {run} OUT: then give OUT as backbone.path" in text
    assert "not merged" in text or "merge the adapter" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"auto_mapping": {"base_model_class": "x; y"}}'])
def test_an_adapter_of_other_programs_is_refused_too(tmp_path: Path, content: str) -> None:
    (tmp_path / backbone_folder.ADAPTER_FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"t\.AutoModelForImageTextToText\.from_pretrained\(base\)"):
        check_backbone_folder(tmp_path)


def test_weights_of_another_shape_are_named(backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(backbone, folder)
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in sorted(weights) if name.endswith("up_proj.weight"))
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights have another shape than config\.json says, .*up_proj"):
        load_backbone(folder, dtype=torch.float32, attention="sdpa")
