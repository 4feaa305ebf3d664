"""Every family, stage of ZeRO and kind of release: what was trained comes out, under the names that
transformers and peft look for, and without the model in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

import agff
from agff.backbone import load_backbone
from agff.checkpoint_folder import checkpoint_folder, checkpoint_name
from agff.contract import read_contract
from agff.errors import CheckpointError, ConfigError
from agff.lazy_tensor import of_tensor
from agff.release import golden_items
from agff.vocabulary_prompts import add_to_vocabulary
from agff.zero_weights import ZeroWeights
from launcher.convert_checkpoint import convert
from launcher.run.config_file import read_recipe
from launcher.run.trained_model import load_run
from tests.agff.family_folders import BUILDERS, published
from tests.consolidated import consolidated_weights
from tests.launcher.first_checkpoints import STEP, save_first_checkpoints
from tests.launcher.runs import SMALL_RECIPE, universal_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::UserWarning")]

RANK, ALPHA = 2, 16
RUNS = [
    *("qwen2_vl-full-zero1", "qwen2_vl-full-zero2", "qwen2_vl-frozen-zero2", "qwen2_vl-frozen-zero3"),
    *("qwen2_vl-lora-zero2", "qwen2_5_vl-full-zero1", "qwen2_5_vl-lora-zero3", "qwen3_vl-full-zero2"),
    *("qwen3_vl-lora-zero1", "llava_onevision-full-zero3", "llava_onevision-lora-zero2"),
]
"""Family, what trained (frozen: all but the vision tower), and the stage that saved it, on two ranks."""
LORA_RUNS = [name for name in RUNS if "-lora-" in name]
RELEASED_AS = {"full": ["merged"], "frozen": ["merged"], "lora": ["merged", "adapter", "both"]}
RELEASES = [(name, kind) for name in RUNS for kind in RELEASED_AS[name.split("-")[1]]]


def write_run(folder: Path, backbone: Path, tuning: str) -> None:
    recipe: dict[str, Any] = {**SMALL_RECIPE, "precision": "fp32", "prompts": {"num_fine": 2}}
    lora = {"rank": RANK, "alpha": ALPHA} if tuning == "lora" else None
    recipe["backbone"] = {"path": str(backbone), "lora": lora, "freeze_vision": tuning == "frozen"}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA runs began from a backbone in its published layout, the others from today's."""
    folder = tmp_path_factory.mktemp("release_kinds")
    for family, build in BUILDERS.items():
        build(folder / family / "today")
        published(folder / family / "today", folder / family / "published")
    for name in RUNS:
        family, tuning, _ = name.split("-")
        write_run(folder / name, folder / family / ("published" if tuning == "lora" else "today"), tuning)
    run_ranks(save_first_checkpoints, folder, {name: int(name[-1]) for name in RUNS}, world_size=2)
    return folder


@pytest.fixture(scope="module")
def releases(runs: Path) -> Path:
    """Also the smallest layers of these tiny models are filled only while they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agff.streamed_model.RESIDENT_ELEMENTS", 0)
        for name, kind in RELEASES:
            convert(runs / name, runs / "releases" / f"{name}-{kind}", dtype=torch.float32, lora=kind)
    return runs / "releases"


def backbone_of(run: Path) -> Path:
    return Path(read_recipe(run / "config.yaml").backbone.path)


@pytest.mark.parametrize("name", RUNS)
def test_partitions_are_put_together_as_deepspeed_does(runs: Path, name: str) -> None:
    found = ZeroWeights(checkpoint_folder(runs / name) / checkpoint_name(STEP)).tensors
    expected = consolidated_weights(runs / name, step=STEP)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[each].read(), expected[each]) for each in expected)


@pytest.mark.parametrize(("name", "kind"), RELEASES)
def test_a_release_makes_the_vectors_of_the_run(runs: Path, releases: Path, name: str, kind: str) -> None:
    base = backbone_of(runs / name) if kind == "adapter" else None
    expected = load_run(runs / name)[0].encode(list(golden_items().values()))
    found = agff.load(releases / f"{name}-{kind}", backbone=base).encode(list(golden_items().values()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # merged adapters sum in another order
    assert (found[0] - found[1]).norm(dim=-1).min() > 0.01, "the items differ"


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in RELEASES if k != "adapter"])
def test_a_release_is_what_transformers_itself_would_write(
    runs: Path, releases: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """Names, shapes and settings, of `save_pretrained` of the run's model with peft's own merge, its prompts
    in the vocabulary; and transformers loads every weight of it."""
    embedder = load_run(runs / name)[0]
    model, processor = embedder.model, embedder.processor
    table = model.prompted_embedding.base
    backbone = model.backbone.merge_and_unload() if kind == "both" or "-lora-" in name else model.backbone
    vocabulary = add_to_vocabulary(processor.tokenizer, backbone.config, processor.prompts)
    grown = of_tensor(table.weight).grown(
        max(len(table.weight), vocabulary.vocabulary_size), dtype=torch.float32
    )
    table.weight.data = vocabulary.put_into(grown, model.prompted_embedding.vectors.data)
    backbone.set_input_embeddings(table)
    backbone.save_pretrained(tmp_path)
    folder = releases / f"{name}-{kind}" / "backbone"
    found, expected = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for each, weight in expected.items():
        torch.testing.assert_close(found[each], weight, rtol=1e-6, atol=1e-6 * ("-lora-" in name))
    assert (folder / "config.json").read_text() == (tmp_path / "config.json").read_text()
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("name", LORA_RUNS)
@pytest.mark.parametrize("kind", ["adapter", "both"])
def test_plain_peft_loads_the_adapter_on_the_public_backbone(
    runs: Path, releases: Path, name: str, kind: str
) -> None:
    folder = releases / f"{name}-{kind}"
    base = AutoModel.from_pretrained(backbone_of(runs / name), dtype=torch.float32)
    before = {each: weight.clone() for each, weight in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    expected = load_backbone(
        releases / f"{name}-both" / "backbone", dtype=torch.float32, attention="sdpa"
    ).state_dict()
    assert expected.keys() == before.keys()
    changed = 0
    for each, weight in model.state_dict().items():
        if each.endswith("embed_tokens.weight"):  # merged, it has the three prompts too
            assert (weight != expected[each][: len(weight)]).any(dim=1).sum() <= 3
            continue
        torch.testing.assert_close(weight, expected[each], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(weight, before[each])
    assert changed == 14, "7 layers of each of the 2 decoder layers"
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 28
    assert all(weight.any() for weight in stored.values())
    assert load_file(folder / "prompts.safetensors")["vectors"].shape == (3, 32)


@pytest.mark.parametrize("name", LORA_RUNS)
def test_merged_is_the_base_and_b_a_alpha_over_r(runs: Path, releases: Path, name: str) -> None:
    saved = consolidated_weights(runs / name, step=STEP)
    base = load_backbone(backbone_of(runs / name), dtype=torch.float32, attention="sdpa").state_dict()
    found = load_backbone(
        releases / f"{name}-merged" / "backbone", dtype=torch.float32, attention="sdpa"
    ).state_dict()
    for each in [each for each in saved if each.endswith("lora_A.default.weight")]:
        plain = each.removeprefix("backbone.base_model.model.").replace(".lora_A.default", "")
        expected = base[plain] + saved[each.replace("lora_A", "lora_B")] @ saved[each] * ALPHA / RANK
        torch.testing.assert_close(found.pop(plain), expected)
        base.pop(plain)
    [table] = [each for each in base if each.endswith("embed_tokens.weight")]
    in_vocabulary = found.pop(table)[: len(base[table])] != base.pop(table)
    assert in_vocabulary.any(dim=1).sum() <= 3, "the prompts take unused rows, or new ones"
    assert all(torch.equal(found[each], base[each]) for each in base)


def test_an_adapter_finds_no_backbone_of_its_own_and_refuses_another(runs: Path, releases: Path) -> None:
    release = releases / "qwen2_vl-lora-zero2-adapter"
    contract = read_contract(release)
    assert (contract.weights, contract.base_model) == ("adapter", None)
    with pytest.raises(ConfigError, match=r'holds an adapter alone.*agff.load\(..., backbone="FOLDER"\)'):
        agff.load(release)
    with pytest.raises(CheckpointError, match="are not those that the adapter was trained on"):
        agff.load(release, backbone=releases / "qwen2_vl-full-zero1-merged" / "backbone")
    with pytest.raises(ConfigError, match="holds its own backbone"):
        agff.load(releases / "qwen2_vl-lora-zero2-both", backbone=runs / "qwen2_vl" / "published")


def test_the_hubs_name_of_the_backbone_is_stored_and_its_cache_is_found(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    release = tmp_path / "release"
    name = "Qwen/Qwen2-VL-0B"
    convert(runs / "qwen2_vl-lora-zero2", release, dtype=torch.float32, lora="adapter", base_model=name)
    assert read_contract(release).base_model == name
    assert peft.PeftConfig.from_pretrained(str(release / "adapter")).base_model_name_or_path == name
    with pytest.raises(ConfigError, match=f"hf download {name} --local-dir FOLDER"):
        agff.load(release)
    snapshot = tmp_path / "hub/models--Qwen--Qwen2-VL-0B/snapshots/abc"
    shutil.copytree(runs / "qwen2_vl" / "published", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert len(agff.load(release).encode("a text")) == 1


@pytest.mark.parametrize(
    "name", [pytest.param("qwen2_vl-frozen-zero2", marks=pytest.mark.slow), "qwen2_vl-lora-zero2"]
)
def test_a_universal_checkpoint_becomes_the_same_release(
    runs: Path, releases: Path, tmp_path: Path, name: str
) -> None:
    universal = universal_of(runs / name, tmp_path / "universal", step=STEP)
    convert(runs / name, tmp_path / "release", dtype=torch.float32, universal=universal)
    expected = releases / f"{name}-merged"
    for file in ("backbone/model.safetensors", "prompts.safetensors"):
        found, wanted = load_file(tmp_path / "release" / file), load_file(expected / file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[each], wanted[each]) for each in wanted)
