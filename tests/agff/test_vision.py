"""The vision tower's output as a value, in models of every family loaded from a folder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.batch import Item, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.families import FAMILIES
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.shared_images import FEATURE_ROWS, IMAGE_FEATURES, IMAGE_IDS, share
from agff.vision import TOWERS, tower_of
from tests.agff.family_folders import BUILDERS, backbone_arguments

PROMPTS = PromptConfig(num_fine=2)
TRAINING: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen vision": {"freeze_vision": True},
    "lora": {"lora": LoraConfig(rank=2, dropout=0.25)},
}
CASES = list(product(TRAINING, (True, False)))
"""What trains, gradient checkpointing."""


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def about(image: Image.Image, question: str) -> Item:
    return Item(text=f"<|image_1|>\n{question}", image=image)


WIDE, TALL, SQUARE = picture(90, 31, 1), picture(28, 112, 2), picture(56, 56, 3)
TEXTS = [Item(text="a heart"), Item(text="two of them")]
MIXED = [Item(text="a heart"), about(WIDE, "what?"), about(TALL, "which of them?"), about(SQUARE, "where?")]
SHARED = [about(WIDE, "what?"), about(SQUARE, "and this?"), Item(text="a heart"), about(WIDE, "where is it?")]


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "backbone"
    torch.manual_seed(0)
    BUILDERS[request.param](path)
    return path


def build(
    folder: Path, *, dtype: torch.dtype = torch.float32, checkpointing: bool = False, **choices: Any
) -> EmbeddingModel:
    torch.manual_seed(0)
    config = BackboneConfig(path=str(folder), gradient_checkpointing=checkpointing, **choices)
    backbone = load_backbone(folder, dtype=dtype, attention="sdpa")
    model = EmbeddingModel(choose_trainable(backbone, config), PROMPTS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("embed_tokens.vectors"):  # they begin at zero
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def processor_of(folder: Path) -> ItemProcessor:
    return ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())


def embedding_and_gradients(model: EmbeddingModel, encode: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of a loss with weights of both signs; dropout is drawn from the same seed each time."""
    model.zero_grad()
    torch.manual_seed(7)
    embedding = encode()
    weight = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(8), dtype=embedding.dtype)
    (embedding * weight).sum().backward()
    named = model.named_parameters()
    return {
        "embedding": embedding.detach(),
        **{name: p.grad for name, p in named if p.grad is not None},
    }


def by_transformers(model: EmbeddingModel, inputs: ModelInputs) -> Tensor:
    """EmbeddingModel.forward with the backbone's own way from pixels to features."""
    arguments, start_B = backbone_arguments(model.family, inputs), inputs["prompt_start_B"]
    states = model.backbone(**arguments, use_cache=False).last_hidden_state
    picked = states[torch.arange(len(start_B))[:, None], start_B[:, None] + model.block_end_M]
    return torch.nn.functional.normalize(picked.float(), dim=-1)


@pytest.mark.parametrize(("training", "checkpointing"), CASES)
def test_features_given_back_are_what_the_backbone_makes_of_the_pixels_to_the_last_bit(
    folder: Path, training: str, checkpointing: bool
) -> None:
    model = build(folder, checkpointing=checkpointing, **TRAINING[training])
    process = processor_of(folder)
    for items in (TEXTS, MIXED):
        inputs = process(items)
        expected = embedding_and_gradients(model, lambda inputs=inputs: by_transformers(model, inputs))
        found = embedding_and_gradients(model, lambda inputs=inputs: model(inputs)["embedding"])
        assert_same_bits(found, expected)
        if training != "full":
            with torch.no_grad():
                ready = model.tower.with_features(inputs, model.encode_images(inputs))
            assert "pixel_values" not in ready
            found = embedding_and_gradients(model, lambda ready=ready: model(ready)["embedding"])
            assert_same_bits(found, expected)
            ready[IMAGE_FEATURES] = ready[IMAGE_FEATURES] + 1
            changed = embedding_and_gradients(model, lambda ready=ready: model(ready)["embedding"])
            assert torch.equal(changed["embedding"], expected["embedding"]) == (items is TEXTS)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("training", TRAINING)
def test_an_image_of_several_rows_is_encoded_once_and_its_gradients_add_up(
    folder: Path, training: str
) -> None:
    """In float64, against each row in a chunk of its own, which shares nothing."""
    model = build(folder, dtype=torch.float64, **TRAINING[training])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn for a chunk as a whole
    process = processor_of(folder)
    together, alone = process(SHARED), [process([item]) for item in SHARED]
    images = [count_images(inputs) for inputs in (together, *alone)]
    assert images == [2, 1, 1, 1, 1], "two different ones; the text alone has a blank one"
    assert FEATURE_ROWS in together
    assert not any(FEATURE_ROWS in inputs for inputs in alone)
    found = embedding_and_gradients(model, lambda: model(together)["embedding"])
    expected = embedding_and_gradients(
        model, lambda: torch.cat([model(inputs)["embedding"] for inputs in alone])
    )
    assert found.keys() == expected.keys()
    assert any("visual" in name or "vision_tower" in name for name in found) == (training == "full")
    # rotary embeddings and norms of the Qwen towers compute in float32, whatever the model does
    tolerance = 1e-6 if training == "full" else 1e-12
    for name, value in expected.items():
        difference = (found[name] - value).norm() / value.norm().clamp(min=1e-3)
        assert difference <= tolerance, f"{name}: {difference:.1e}"


def count_images(inputs: ModelInputs) -> int:
    sizes = inputs["image_grid_thw"] if "image_grid_thw" in inputs else inputs["image_sizes"]
    assert len(sizes) == len(inputs[IMAGE_IDS])
    return len(sizes)


def test_a_part_of_the_images_gives_their_part_of_the_features(folder: Path) -> None:
    model = build(folder, dtype=torch.float64)
    inputs, tower = processor_of(folder)(MIXED), model.tower
    with torch.no_grad():
        whole = model.encode_images(inputs).split(tower.num_rows(inputs))
        for images in ([0], [2, 0], [1, 2]):
            part = model.encode_images(tower.select(inputs, images))
            expected = torch.cat([whole[image] for image in images])
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("training", "is_frozen"), [("full", False), ("frozen vision", True), ("lora", True)]
)
def test_a_tower_is_frozen_when_nothing_in_it_trains_or_is_random(
    folder: Path, training: str, is_frozen: bool
) -> None:
    model = build(folder, **TRAINING[training])
    assert model.tower.is_frozen == is_frozen
    model.tower.module.train()
    assert not model.tower.is_frozen


def test_every_family_has_a_tower() -> None:
    assert set(TOWERS) == set(FAMILIES.values())


def test_a_tower_is_found_behind_adapters(folder: Path) -> None:
    plain, adapted = build(folder), build(folder, lora=LoraConfig(rank=2))
    assert type(tower_of(plain.backbone)) is type(tower_of(adapted.backbone))


def test_images_are_the_same_by_their_pixels_and_size() -> None:
    """Not by who holds them."""
    flat = Image.new("RGB", (30, 60), "red")
    turned = Image.new("RGB", (60, 30), "red")
    other = flat.copy()
    other.putpixel((29, 59), (254, 0, 0))
    found = share([flat, turned, flat.copy(), other, turned])
    assert found.index == (0, 1, 0, 2, 1)
    assert found.unique == (flat, turned, other)
    assert len(set(found.ids)) == 3
    assert found.inputs([2, 1, 3])[FEATURE_ROWS].tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 2]
