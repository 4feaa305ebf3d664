"""The families that can be named as backbone, each built tiny from its configuration."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from agff.backbone import BackboneConfig, LoraConfig, check_attention, choose_trainable, load_backbone
from agff.batch import Item
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import ConfigError
from agff.families import FAMILIES, LlavaOneVision
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
from tests.agff.family_folders import BUILDERS, llava_onevision, published
from tests.drawings import tiny_backbone

ROOT = Path(__file__).parents[2]
PROMPTS = PromptConfig(num_fine=2)


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "backbone"
    BUILDERS[request.param](path)
    return path


def build(folder: Path, **choices: Any) -> tuple[EmbeddingModel, ItemProcessor]:
    torch.manual_seed(0)
    backbone = load_backbone(folder, dtype=torch.float32, attention="sdpa")
    model = EmbeddingModel(choose_trainable(backbone, BackboneConfig(path=str(folder), **choices)), PROMPTS)
    torch.nn.init.normal_(model.prompted_embedding.vectors)
    return model, ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())


def test_items_of_any_kind_and_image_shape_are_encoded_the_same_alone_and_together(folder: Path) -> None:
    model, processor = build(folder)
    items = [
        "a heart",
        Image.new("RGB", (56, 56), "red"),
        {"text": "what is it?", "image": Image.new("RGB", (90, 31), "green")},
        {"text": "and <|image_1|> this?", "image": Image.new("RGB", (28, 112), "blue")},
    ]
    embedder = Embedder(model, processor, FusionConfig())
    together = embedder.encode(items)
    assert together.shape == (4, 3, 32)
    alone = torch.cat([embedder.encode([item]) for item in items])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[1] - embedder.encode([Image.new("RGB", (56, 56), "blue")])[0]).abs().max() > 1e-3


def test_tokens_are_counted_without_encoding(folder: Path) -> None:
    _, processor = build(folder)
    sizes = [(56, 56), (90, 31), (28, 112), (500, 333), (7, 300)]
    items = [
        Item(text="a heart"),
        *(Item(text="<|image_1|>\nwhat?", image=Image.new("RGB", size)) for size in sizes),
    ]
    for item in items:
        inputs = processor([item, item])
        assert processor.num_tokens(item) == int(inputs["prompt_start_B"][0]) + PROMPTS.num_tokens
    assert processor.max_image_pixels >= 28 * 28


def test_every_parameter_in_use_gets_a_gradient_also_without_images(folder: Path) -> None:
    """Under ZeRO-3 the ranks must reduce the same parameters, so the vision tower takes part in a chunk of
    texts."""
    model, processor = build(folder)
    from agff.embedder import as_item

    reached = []
    for items in (["a heart", "two"], ["a heart", Image.new("RGB", (56, 56), "red")]):
        model.zero_grad()
        embedding_BMD = model(processor([as_item(item) for item in items]))["embedding"]
        embedding_BMD.square().sum(dim=-1).mul(torch.rand(2, 3)).sum().backward()
        reached.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1]
    assert any("visi" in name or "visual" in name for name in reached[0])


def test_lora_trains_adapters_of_the_language_model_and_the_prompts(folder: Path) -> None:
    model, _ = build(folder, lora=LoraConfig(rank=2))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = trainable - {name for name in trainable if name.endswith("embed_tokens.vectors")}
    assert len(trainable) == len(adapters) + 1
    assert len(adapters) == 2 * 7 * 2, "A and B of seven linear layers in two decoder layers"
    assert all("lora_" in name and ".language_model.layers." in name for name in adapters)


def test_a_frozen_vision_tower_leaves_the_rest_trainable(folder: Path) -> None:
    model, _ = build(folder, freeze_vision=True)
    for name, parameter in model.named_parameters():
        is_tower = name.startswith(("backbone.visual.", "backbone.vision_tower."))
        assert parameter.requires_grad != is_tower, name


@pytest.mark.parametrize("choices", [{"freeze_vision": True}, {"lora": LoraConfig(rank=2)}])
def test_a_vision_tower_that_is_not_there_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]
) -> None:
    """Nothing would be frozen, in silence."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    monkeypatch.setattr(FAMILIES[model_type], "vision_tower", "eye")
    with pytest.raises(ConfigError, match=r"has no vision tower 'eye', so nothing of it would be frozen"):
        build(folder, **choices)


@pytest.mark.parametrize("choices", [{}, {"freeze_vision": True}, {"lora": LoraConfig(rank=2)}])
def test_a_backbone_of_no_known_family_is_not_trained(choices: dict[str, Any]) -> None:
    stranger = torch.nn.Linear(1, 1)
    stranger.config = SimpleNamespace(model_type="idefics3")
    with pytest.raises(ConfigError, match="backbone of type 'idefics3' is not supported; known are qwen2_vl"):
        choose_trainable(stranger, BackboneConfig(path="", **choices))


def test_every_family_is_tested() -> None:
    assert set(BUILDERS) == set(FAMILIES)


def test_training_differs_from_evaluation_by_the_dropout_that_is_configured(folder: Path) -> None:
    """That of the backbones' own configuration is 0; that of the adapters acts in training only."""
    for lora in (None, LoraConfig(rank=2, dropout=0.5)):
        model, processor = build(folder, lora=lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # begins at zero, where no dropout can be seen
                torch.nn.init.normal_(parameter)
        inputs = processor([Item(text="a heart"), Item(text="two")])
        with torch.no_grad():
            in_training = [model(inputs)["embedding"] for _ in range(2)]
        assert torch.equal(*in_training) == (lora is None)
        embedder = Embedder(model, processor, FusionConfig())
        assert not any(module.training for module in embedder.model.modules())
        with torch.no_grad():
            in_evaluation = [model(inputs)["embedding"] for _ in range(2)]
        assert torch.equal(*in_evaluation)
        assert torch.equal(in_training[0], in_evaluation[0]) == (lora is None)


def test_a_folder_in_the_published_layout_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Flat configuration, old key names, sharded, head not tied. Under ZeRO-3: test_engine.py."""
    torch.manual_seed(0)
    models = [build(path) for path in (folder, published(folder, tmp_path / "published"))]
    today, then = ({name: p for name, p in model.named_parameters()} for model, _ in models)
    assert today.keys() == then.keys()
    for name, parameter in today.items():
        assert torch.equal(parameter, then[name]), name
    items = ["a heart", {"text": "what is it?", "image": Image.new("RGB", (90, 31), "green")}]
    embeddings = [Embedder(model, processor, FusionConfig()).encode(items) for model, processor in models]
    assert torch.equal(*embeddings), "sizes, rotary embedding and special tokens were read too"
    (tmp_path / "published/model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00003\.safetensors: missing"):
        build(tmp_path / "published")


@pytest.mark.parametrize(
    ("installed", "works", "precision", "message"),
    [
        (
            None,
            False,
            "bf16",
            r"attention=flash_attention_2, but the package flash-attn is not installed; pip",
        ),
        (
            "2.8.3",
            False,
            "bf16",
            r"flash-attn 2\.8\.3 cannot be used here: it needs version 2\.3\.3 or later and",
        ),
        ("2.8.3", True, "fp32", r"computes in bf16 only, but the precision is fp32"),
    ],
)
def test_attention_that_cannot_run_is_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, works: bool, precision: str, message: str
) -> None:
    def version(package: str) -> str:
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr("agff.backbone.version", version)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: works)
    for name in ("sdpa", "eager"):
        check_attention(name, precision=precision)
    with pytest.raises(ConfigError, match=message):
        check_attention("flash_attention_2", precision=precision)
    if works:
        check_attention("flash_attention_2", precision="bf16")


def test_pixel_limits_have_no_meaning_for_llava(tmp_path: Path) -> None:
    llava_onevision(tmp_path)
    with pytest.raises(ConfigError, match="no meaning for llava_onevision"):
        ItemProcessor.from_folder(tmp_path, prompts=PROMPTS, limits=ProcessorConfig(max_pixels=1000))


def test_every_image_fits_the_recipe_of_llava() -> None:
    """With the numbers of the published 7B model: pinpoints of 384 to 2304 pixels, views of 27 x 27
    patches."""
    recipe = yaml.safe_load((ROOT / "launcher/recipes/mmeb_llava_ov_7b.yaml").read_text())
    steps = range(384, 2305, 384)
    family = LlavaOneVision(
        name="llava_onevision",
        blank_image_size=384,
        pinpoints=[[height, width] for height in steps for width in steps],
        view_size=384,
        patch_size=14,
        max_crops=9,
    )
    sides = (*range(32, 3000, 64), *steps)
    most = max(family.num_tokens_of_size(height, width, None) for height in sides for width in sides)
    assert 8000 < most <= recipe["processor"]["max_tokens"] - 256, "room for prompts and text"


def test_weights_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    """transformers would begin with random ones, with a warning."""
    weights = tiny_backbone(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"the weights lack 1 parameters of the model, .*layers\.1\.mlp\.up_proj\.weight"
    ):
        load_backbone(tmp_path, dtype=torch.float32, attention="sdpa")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ConfigError, match=r"cannot load a backbone"):
        load_backbone(tmp_path, dtype=torch.float32, attention="sdpa")


@pytest.mark.parametrize("family", BUILDERS)
def test_a_transformers_that_would_drop_images_is_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward of another version takes whatever it does not know, and ignores it."""
    BUILDERS[family](tmp_path)
    model = load_backbone(tmp_path, dtype=torch.float32, attention="sdpa")

    def forward(self: Any, input_ids: Tensor | None = None, **kwargs: Any) -> None: ...

    monkeypatch.setattr(type(model), "forward", forward)
    expected = (
        rf"transformers {version('transformers')}: {type(model).__name__} does not take the vision tower's "
        r"output \(mm_encoder_outputs\) and would ignore every image; install the version that requirements"
    )
    with pytest.raises(ConfigError, match=expected):
        load_backbone(tmp_path, dtype=torch.float32, attention="sdpa")


def test_other_backbones_are_refused(tmp_path: Path) -> None:
    tiny_backbone(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="backbone of type 'qwen2' is not supported; known are qwen2_vl"):
        ItemProcessor.from_folder(tmp_path, prompts=PROMPTS, limits=ProcessorConfig())
