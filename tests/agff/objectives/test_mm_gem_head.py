"""MM-GEM's head on the three families that it takes, loaded from folders in their published layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agff.backbone import load_backbone
from agff.backbone_folder import HEAD_FILE
from agff.batch import HOST_INPUTS, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.errors import ConfigError
from agff.joined import join_chunks
from agff.kept_vision import with_image_features
from agff.objectives import mm_gem_head
from agff.objectives.mm_gem import MmGem
from agff.objectives.mm_gem_head import MmGemHead, NextToken
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.regions import ImageCells, mean_cells
from agff.shared_images import IMAGE_FEATURES
from agff.vision import IMAGE_TOKENS
from tests.agff.family_folders import BUILDERS, published
from tests.agff.test_families import DeviceReads, item

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_onevision")
PROMPTS = PromptConfig(num_fine=0, tokens_per_prompt=2)
OBJECTIVE = MmGem(grid=3, region_grid=2)

PICTURE = item("what?", 200, 100)
WITH_CAPTION = dataclasses.replace(item("", 200, 100), caption="a red heart on a hill")
REGION = dataclasses.replace(PICTURE, box=(20.0, 10.0, 90.0, 60.0), caption="a star")
WHOLE = dataclasses.replace(PICTURE, box=(0.0, 0.0, 200.0, 100.0))
ITEMS = [PICTURE, item("a heart"), WITH_CAPTION, item("", 60, 90), REGION, WHOLE]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("today") / request.param
    BUILDERS[request.param](path)
    return published(path, tmp_path_factory.mktemp("published") / request.param)


def model_of(folder: Path, *, seed: int = 0) -> EmbeddingModel:
    """With a head that is not as it begins: every part of it matters."""
    backbone = load_backbone(folder, dtype=torch.float32, attention="sdpa")
    head = OBJECTIVE.build_head(backbone.config)
    head.load_from(folder, backbone.config)
    model = EmbeddingModel(backbone, PROMPTS, head)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "lm_head" not in name and ("head." in name or "vectors" in name):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def head_of(model: EmbeddingModel) -> MmGemHead:
    assert isinstance(model.head, MmGemHead)
    return model.head


def processor_of(folder: Path, **limits: int) -> ItemProcessor:
    config = ProcessorConfig(**({"max_tokens": 64} | limits))
    return ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=config, cells=OBJECTIVE.image_cells)


# ------------------------------------------------------------------ what it says of a row


def test_an_image_is_h1_of_the_mean_of_its_cells_and_a_text_h3_of_its_state(folder: Path) -> None:
    model, processor = model_of(folder), processor_of(folder)
    head, inputs = head_of(model), processor(ITEMS)
    with torch.no_grad():
        found = model(inputs)["embedding"]
        assert found.shape == (len(ITEMS), 1, 32)
        features = model.tower.with_features(inputs, model.encode_images(inputs))
        for row, map_HWD in ((0, 0), (3, 2)):
            grid = head.grids([model.tower.maps(features)[map_HWD]])[0]
            vector = torch.nn.functional.normalize(head.h1(grid.mean(dim=(0, 1))), dim=0)
            torch.testing.assert_close(found[row, 0], vector)
        plain = EmbeddingModel(load_backbone(folder, dtype=torch.float32, attention="sdpa"), PROMPTS)
        plain.prompted_embedding.vectors.copy_(model.prompted_embedding.vectors)
        text = ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())([ITEMS[1]])
        state = plain.backbone(**plain.tower.backbone_inputs(features_of(plain, text))).last_hidden_state
        end = int(text["prompt_start_B"]) + 1
        vector = torch.nn.functional.normalize(head.h3(state[0, end]), dim=0)
        torch.testing.assert_close(found[1, 0], vector, rtol=1e-4, atol=1e-6)


def features_of(model: EmbeddingModel, inputs: ModelInputs) -> ModelInputs:
    return model.tower.with_features(inputs, model.encode_images(inputs))


def test_the_region_of_the_whole_image_is_the_image(folder: Path) -> None:
    with torch.no_grad():
        found = model_of(folder)(processor_of(folder)(ITEMS))["embedding"][:, 0]
    torch.testing.assert_close(found[5], found[0], rtol=0, atol=1e-6)
    assert (found[4] - found[0]).abs().max() > 1e-3, "a part of it is not"


def test_a_row_is_the_same_alone_in_any_chunk_and_with_any_caption(folder: Path) -> None:
    model, processor = model_of(folder), processor_of(folder)
    with torch.no_grad():
        together = model(processor(ITEMS))
        joined = model(join_chunks([processor(ITEMS[:2]), processor(ITEMS[2:])], model.family))
        texts = model(join_chunks([processor([ITEMS[1]]), processor([ITEMS[1]])], model.family))
        for row, each in enumerate(ITEMS):
            alone = model(processor([each]))
            for name in ("embedding", "caption_nll", "caption_tokens"):
                torch.testing.assert_close(alone[name][0], together[name][row], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(joined[name][row], together[name][row], rtol=1e-4, atol=1e-5)
        other = model(processor([dataclasses.replace(WITH_CAPTION, caption="another")]))
    torch.testing.assert_close(other["embedding"][0], together["embedding"][2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(texts["embedding"][1], together["embedding"][1], rtol=1e-4, atol=1e-6)
    lengths = [len(processor.tokenize(each.caption)) + 1 if each.caption else 0 for each in ITEMS]
    assert together["caption_tokens"].tolist() == lengths
    assert (together["caption_nll"] > 0).tolist() == [length > 0 for length in lengths]


def test_kept_features_give_the_same_bits_and_the_tower_runs_once_for_each_image(folder: Path) -> None:
    model, processor = model_of(folder), processor_of(folder)
    chunks = [processor(ITEMS[:3]), processor(ITEMS[3:])]
    calls = []

    def encode(inputs: ModelInputs) -> Tensor:
        calls.append(sum(model.tower.num_rows(inputs)))
        return model.encode_images(inputs)

    with torch.no_grad():
        kept = with_image_features(
            chunks, model.tower, encode=encode, keep=lambda features: features, agree=lambda number: number
        )
        assert all(IMAGE_FEATURES in chunk for chunk in kept)
        for chunk, own in zip(kept, chunks, strict=True):
            for name, tensor in model(chunk).items():
                torch.testing.assert_close(tensor, model(own)[name], rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    first, second = (sum(model.tower.num_rows(chunk)) for chunk in chunks)
    assert sum(calls) < first + second, "PICTURE is in both"


def test_the_host_never_waits_for_the_device(folder: Path) -> None:
    model, inputs = model_of(folder), processor_of(folder)(ITEMS)
    head, features = head_of(model), features_of(model, inputs)
    with torch.no_grad(), DeviceReads([inputs[name] for name in HOST_INPUTS if name in inputs]) as reads:
        tokens = head.with_image_tokens(features, model.tower.maps(features))
        head([torch.zeros(*inputs["input_ids"].shape, 32)], tokens, torch.zeros(len(ITEMS), 1, 32))
    assert reads.found == []


# ------------------------------------------------------------------ generation


def test_the_likelihood_of_a_caption_is_transformers_own_loss(folder: Path) -> None:
    """Of its model with a language-model head, for the same embeddings of tokens and the same labels."""
    from transformers import AutoModelForImageTextToText

    model, inputs = model_of(folder), processor_of(folder)(ITEMS)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = model(inputs)
        features = features_of(model, inputs)
        tokens = head_of(model).with_image_tokens(features, model.tower.maps(features))[IMAGE_TOKENS]
        ids = inputs["input_ids"]
        embedded = model.prompted_embedding(ids)
        embedded[ids == model.backbone.config.image_token_id] = tokens
        labels = torch.full_like(ids, -100)
        for row, (start, length) in enumerate(
            zip(inputs["caption_start_B"].tolist(), inputs["caption_length_B"].tolist(), strict=True)
        ):
            labels[row, start : start + length] = ids[row, start : start + length]
        arguments = model.family.language_arguments(inputs) | {"input_ids": None}
        loss = whole(**arguments, inputs_embeds=embedded, labels=labels).loss
    assert (labels >= 0).sum() == found["caption_tokens"].sum() > 10
    generation = found["caption_nll"].sum() / found["caption_tokens"].sum()
    torch.testing.assert_close(generation, loss, rtol=1e-5, atol=1e-6)


def test_logits_exist_for_caption_tokens_alone_and_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head = NextToken(11, 4).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(head.weight)
    states = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 10, 5, 5, 1, 2])
    whole = torch.nn.functional.cross_entropy(states @ head.weight.T, labels, reduction="none")
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = torch.autograd.grad((whole * weights).sum(), [states, head.weight])
    monkeypatch.setattr(mm_gem_head, "LOGITS_AT_ONCE", 25)  # two tokens
    rows: list[int] = []
    own = NextToken.logits
    monkeypatch.setattr(NextToken, "logits", lambda self, x: (rows.append(len(x)), own(self, x))[1])
    found = head(states, labels)
    assert rows == [2, 2, 2, 1]
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((found * weights).sum(), [states, head.weight])
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ its parts


def test_an_untrained_pool_gives_the_means_of_the_maps_beside_small_positions() -> None:
    head = MmGemHead(6, 9, ImageCells(side=3, region_side=1), temperature=0.5)
    maps = [torch.randn(9, 6, 6), torch.randn(2, 5, 6)]
    grids = head.grids(maps)
    assert [grid.shape[:2] for grid in grids] == [(3, 3), (2, 3)]
    for grid, each in zip(grids, maps, strict=True):
        positions = mean_cells(head.pool.positions, *grid.shape[:2])
        torch.testing.assert_close(grid - positions, mean_cells(each, *grid.shape[:2]))


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.9])
def test_the_temperature_begins_as_it_is_set_and_stays_within_its_bounds(temperature: float) -> None:
    from tests.agff.objectives.test_mm_gem import backbone_config

    head = MmGem(temperature=temperature).build_head(backbone_config())
    assert isinstance(head, MmGemHead)

    def now() -> float:
        inputs = {
            "row_kind_B": torch.zeros(1, dtype=torch.int64),
            "caption_start_B": torch.tensor([1]),
            "caption_length_B": torch.tensor([0]),
            mm_gem_head.IMAGE_CELL: torch.zeros(1, 16),
        }
        return float(head([torch.ones(1, 2, 16)], inputs, torch.ones(1, 1, 16))["temperature"].detach())

    assert now() == pytest.approx(temperature, rel=1e-5)
    for value, bound in ((-60.0, 0.01), (60.0, 1.0)):
        torch.nn.init.constant_(head.temperature_logit, value)
        assert now() == pytest.approx(bound, rel=1e-5)


# ------------------------------------------------------------------ the language model's head


def weight_of(folder: Path) -> Tensor:
    backbone = load_backbone(folder, dtype=torch.float32, attention="sdpa")
    head = OBJECTIVE.build_head(backbone.config)
    head.load_from(folder, backbone.config)
    assert isinstance(head, MmGemHead)
    return head.lm_head.weight.detach()


def stored_in(folder: Path, ending: str) -> Tensor:
    return next(
        tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.endswith(ending)
    )


def test_the_language_models_head_is_that_of_the_backbone_folder(folder: Path) -> None:
    torch.testing.assert_close(weight_of(folder), stored_in(folder, "lm_head.weight"), rtol=0, atol=0)


def test_where_it_is_tied_it_begins_as_the_embedding(tmp_path: Path) -> None:
    BUILDERS["qwen2_vl"](tmp_path)  # the configuration ties it
    torch.testing.assert_close(weight_of(tmp_path), stored_in(tmp_path, "embed_tokens.weight"))


def test_a_backbone_without_one_is_refused_unless_it_is_part_of_a_release_that_has_one(
    tmp_path: Path,
) -> None:
    BUILDERS["qwen2_5_vl"](tmp_path / "backbone")  # saved without, and not tied
    with pytest.raises(ConfigError, match=r"no language-model head here \(lm_head.weight\), and the config"):
        weight_of(tmp_path / "backbone")
    weight = torch.randn(512, 32)
    save_file({"lm_head.weight": weight, "h1.bias": torch.zeros(32)}, tmp_path / HEAD_FILE)
    torch.testing.assert_close(weight_of(tmp_path / "backbone"), weight)


def test_a_head_of_another_shape_is_named(tmp_path: Path) -> None:
    BUILDERS["qwen2_5_vl"](tmp_path / "backbone")
    save_file({"lm_head.weight": torch.randn(500, 32)}, tmp_path / HEAD_FILE)
    with pytest.raises(ConfigError, match=r"\(lm_head.weight\) is \[500, 32\], must be \[512, 32\]"):
        weight_of(tmp_path / "backbone")
