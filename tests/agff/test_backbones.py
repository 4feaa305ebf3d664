"""The families that can be named as backbone, each built tiny from its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.batch import Item
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import ConfigError
from agff.families import LlavaOneVision
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
from tests.drawings import tiny_backbone

ROOT = Path(__file__).parents[2]
PROMPTS = PromptConfig(num_fine=2)
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
TEXT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}


def special_tokens(folder: Path) -> dict[str, int]:
    """Of the tiny Qwen2-VL, whose tokenizer and image processor serve the later ones too."""
    tokens = json.loads((tiny_backbone(folder) / "config.json").read_text())
    return {name: tokens[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id")}


def qwen2_5_vl(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**VISION, "fullatt_block_indexes": [1]},
        **special_tokens(folder),
    )
    Qwen2_5_VLModel(config).save_pretrained(folder)


def qwen3_vl(folder: Path) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config={**VISION, "deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        **special_tokens(folder),
    )
    Qwen3VLModel(config).save_pretrained(folder)


def llava_onevision(folder: Path) -> None:
    from transformers import AutoTokenizer, LlavaOnevisionConfig, LlavaOnevisionModel
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tiny_backbone(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": 520},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    LlavaOnevisionModel(config).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints,
        crop_size={"height": 28, "width": 28},
    ).save_pretrained(folder)


BUILDERS = {
    "qwen2_vl": tiny_backbone,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
}


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
        assert processor.num_tokens(item) == int(inputs["attention_mask"][0].sum())
    assert processor.max_image_pixels >= 28 * 28


def test_every_parameter_in_use_gets_a_gradient_also_without_images(folder: Path) -> None:
    """Under ZeRO-3 the ranks must reduce the same parameters, so the vision tower takes part in a chunk of
    texts."""
    model, processor = build(folder)
    from agff.embedder import as_item

    reached = []
    for items in (["a heart", "two"], ["a heart", Image.new("RGB", (56, 56), "red")]):
        model.zero_grad()
        model(processor([as_item(item) for item in items])).square().sum(dim=-1).mul(
            torch.rand(2, 3)
        ).sum().backward()
        reached.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1]
    assert any("visi" in name or "visual" in name for name in reached[0])


def test_lora_trains_adapters_of_the_language_model_and_the_prompts(folder: Path) -> None:
    model, _ = build(folder, lora=LoraConfig(rank=2))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trainable)
    assert all("lora_" in name or name.endswith("vectors") for name in trainable)
    assert not any("visual" in name or "vision" in name for name in trainable)


def test_frozen_vision_leaves_the_rest_trainable(folder: Path) -> None:
    model, _ = build(folder, freeze_vision=True)
    for name, parameter in model.named_parameters():
        is_vision = name.startswith(("backbone.visual.", "backbone.vision_tower."))
        assert parameter.requires_grad != is_vision, name


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


def test_other_backbones_are_refused(tmp_path: Path) -> None:
    tiny_backbone(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="backbone of type 'qwen2' is not supported; known are qwen2_vl"):
        ItemProcessor.from_folder(tmp_path, prompts=PROMPTS, limits=ProcessorConfig())
