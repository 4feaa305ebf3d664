"""Captions and regions of a model that generates, from the embedder and from its release."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import agff
from agff import contract
from agff.backbone_folder import HEAD_FILE
from agff.captioning import generate
from agff.embedder import Embedder, as_item
from agff.errors import CheckpointError, ConfigError, DataError
from agff.joined import join_chunks
from agff.release_writer import save_release
from agff.similarity import FusionConfig
from tests.agff.family_folders import BUILDERS, published
from tests.agff.objectives.test_mm_gem_head import FAMILIES, OBJECTIVE, item, model_of, processor_of

PICTURE = item("what?", 200, 100)
BOXES = [(20.0, 10.0, 90.0, 60.0), (0.0, 0.0, 200.0, 100.0), (100.0, 50.0, 150.5, 99.0)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("today") / request.param
    BUILDERS[request.param](path)
    return published(path, tmp_path_factory.mktemp("published") / request.param)


def embedder_of(folder: Path) -> Embedder:
    return Embedder(model_of(folder), processor_of(folder), FusionConfig(), objective=OBJECTIVE)


def slow_greedy(embedder: Embedder, boxes: list | None, num_tokens: int) -> list[list[int]]:
    """The whole row once more for each token, by the model that training runs: no cache, no generate."""

    said: list[list[int]] = []
    model, processor = embedder.model, embedder.processor
    end = processor.tokenizer.eos_token_id
    for box in boxes or [None]:
        ids: list[int] = []
        with torch.no_grad():
            while len(ids) < num_tokens and end not in ids:
                inputs = dict(processor([replace(PICTURE, box=box)]))
                row = torch.tensor([[*inputs["input_ids"][0].tolist(), *ids]])
                inputs["input_ids"] = row
                if "position_ids" in inputs:
                    more = inputs["position_ids"][..., -1:] + 1 + torch.arange(len(ids))
                    inputs["position_ids"] = torch.cat([inputs["position_ids"], more], dim=-1)
                inputs = model.with_image_tokens(inputs)
                states = model.backbone(**model.tower.backbone_inputs(inputs)).last_hidden_state
                ids.append(int(model.head.lm_head.logits(states[0, -1]).argmax()))
        said.append(ids[:-1] if ids[-1] == end else ids)
    return said


def test_greedy_generation_is_the_likeliest_token_at_each_step(folder: Path) -> None:
    """With a cache, in a batch, and with positions that count on behind a grid."""
    embedder = embedder_of(folder)
    tokenizer = embedder.processor.tokenizer
    for boxes in (None, BOXES):
        expected = slow_greedy(embedder, boxes, 6)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
        assert embedder.caption(PICTURE, boxes, max_tokens=6) == texts
        assert embedder.caption(PICTURE, boxes, max_tokens=6, batch_size=2) == texts
        assert any(texts)


def test_a_beam_search_finds_what_is_at_least_as_likely(folder: Path) -> None:
    embedder = embedder_of(folder)
    inputs = embedder.processor([PICTURE])
    end = embedder.processor.tokenizer.eos_token_id
    found = []
    for num_beams in (1, 8):
        [ids] = generate(embedder.model, inputs, max_tokens=4, num_beams=num_beams, end_id=end)
        found.append(likelihood(embedder, ids))
    assert found[1] >= found[0] - 1e-5


def likelihood(embedder: Embedder, ids: list[int]) -> float:
    """Mean log-likelihood of tokens behind the prompts: what a beam search maximises by its definition."""
    model, inputs = embedder.model, dict(embedder.processor([PICTURE]))
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    if "position_ids" in inputs:
        more = inputs["position_ids"][..., -1:] + 1 + torch.arange(len(ids))
        inputs["position_ids"] = torch.cat([inputs["position_ids"], more], dim=-1)
    inputs["caption_length_B"] = torch.tensor([len(ids)])
    assert int(inputs["caption_start_B"]) == start
    with torch.no_grad():
        return -float(model(inputs)["caption_nll"]) / len(ids)


def test_rows_of_other_lengths_are_not_generated_together(folder: Path) -> None:
    embedder = embedder_of(folder)
    short = item("", 200, 100)
    inputs = join_chunks([embedder.processor([PICTURE]), embedder.processor([short])], embedder.model.family)
    with pytest.raises(ValueError, match="all must have equally many"):
        generate(embedder.model, inputs, max_tokens=2, num_beams=1, end_id=0)


def test_regions_have_vectors_and_the_whole_image_is_the_image(folder: Path) -> None:
    embedder = embedder_of(folder)
    found = embedder.encode_regions(PICTURE, BOXES)
    assert found.shape == (3, 1, 32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 1))
    torch.testing.assert_close(found[1], embedder.encode([PICTURE])[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(embedder.encode_regions(PICTURE, torch.tensor(BOXES)), found)
    torch.testing.assert_close(
        embedder.encode_regions(PICTURE, BOXES, batch_size=1), found, atol=1e-6, rtol=0
    )


def test_a_release_reproduces_vectors_regions_and_captions(folder: Path, tmp_path: Path) -> None:
    embedder = embedder_of(folder)
    texts = ["a heart", PICTURE, {"image": PICTURE.image}]

    def everything(model: Embedder) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        captions = [
            *model.caption(PICTURE, BOXES, max_tokens=5),
            *model.caption({"image": PICTURE.image}, max_tokens=5, num_beams=3),
        ]
        return model.encode(texts), model.encode_regions(PICTURE, BOXES), captions

    vectors, regions, captions = everything(embedder)
    save_release(embedder, tmp_path / "release", origin={})
    loaded = agff.load(tmp_path / "release")
    assert loaded.objective == OBJECTIVE
    found = everything(loaded)
    torch.testing.assert_close(found[0], vectors, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], regions, rtol=0, atol=1e-6)
    assert found[2] == captions


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("part", ["lm_head.weight", "h2.inner.weight", "h1.weight"])
def test_a_head_of_the_same_size_with_other_numbers_is_refused(
    qwen: Embedder, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large: no golden vector depends on what only captions need."""
    save_release(copy.deepcopy(qwen), tmp_path, origin={})
    monkeypatch.setattr(contract, "MAX_HASHED_BYTES", 0)
    agff.load(tmp_path)
    weights = load_file(tmp_path / HEAD_FILE)
    save_file({**weights, part: torch.randn(weights[part].shape)}, tmp_path / HEAD_FILE)
    with pytest.raises(CheckpointError, match=r"head.safetensors: found \d+ bytes, sha256"):
        agff.load(tmp_path)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    path = tmp_path_factory.mktemp("qwen2_vl")
    BUILDERS["qwen2_vl"](path)
    return embedder_of(path)


@pytest.mark.parametrize("method", ["encode_regions", "caption"])
def test_all_bad_boxes_are_named(qwen: Embedder, method: str) -> None:
    boxes = [(0, 0, 5, 5), (0, 0, 201, 5), (9, 0, 3, 5), (3, 3, 3, 5), (0, 0, 5), 7, None, "abcd"]
    with pytest.raises(DataError) as caught:
        getattr(qwen, method)(PICTURE, boxes)
    assert [line[:9] for line in str(caught.value).splitlines()] == [f"boxes[{i}]:" for i in range(1, 8)]


@pytest.mark.parametrize("method", ["encode_regions", "caption"])
@pytest.mark.parametrize("box", [[1, 2, 30, 40], np.array([1, 2, 30, 40]), torch.tensor([1, 2, 30, 40])])
def test_one_box_in_place_of_a_list_is_named(qwen: Embedder, method: str, box: Any) -> None:
    with pytest.raises(DataError, match=r"boxes\[0\]: box 1 must be four finite numbers x0, y0, x1, y1"):
        getattr(qwen, method)(PICTURE, box)


@pytest.mark.parametrize("number", [int, float, np.int64, np.float32, np.float64])
def test_boxes_are_numbers_of_any_kind_in_a_list_or_an_array(qwen: Embedder, number: Any) -> None:
    box = [number(value) for value in (1, 2, 30, 40)]
    expected = qwen.encode_regions(PICTURE, [(1.0, 2.0, 30.0, 40.0)])
    for boxes in ([box], [tuple(box)], np.array([box]), torch.tensor([[float(x) for x in box]])):
        assert torch.equal(qwen.encode_regions(PICTURE, boxes), expected)


@pytest.mark.parametrize("method", ["encode_regions", "caption"])
@pytest.mark.parametrize("image", ["a text", {"text": "a text"}])
def test_what_has_no_image_has_no_regions(qwen: Embedder, method: str, image: object) -> None:
    with pytest.raises(DataError, match="image: has no image"):
        getattr(qwen, method)(image, BOXES)


def test_no_boxes_give_nothing(qwen: Embedder) -> None:
    assert qwen.encode_regions(PICTURE, []).shape == (0, 1, 32)
    assert qwen.caption(PICTURE, []) == []


@pytest.mark.parametrize("setting", ["max_tokens", "num_beams", "batch_size"])
def test_settings_of_a_caption_must_be_positive(qwen: Embedder, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=0.* must be >= 1"):
        qwen.caption(PICTURE, **{setting: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["encode_regions", "caption"])
def test_a_model_that_was_trained_otherwise_says_so(tmp_path: Path, method: str) -> None:
    from agff.backbone import load_backbone
    from agff.embedding_model import EmbeddingModel
    from agff.processor import ItemProcessor, ProcessorConfig
    from agff.prompts import PromptConfig

    BUILDERS["qwen2_vl"](tmp_path)
    processor = ItemProcessor.from_folder(tmp_path, prompts=PromptConfig(), limits=ProcessorConfig())
    model = EmbeddingModel(load_backbone(tmp_path, dtype=torch.float32, attention="sdpa"), PromptConfig())
    with pytest.raises(ConfigError, match=r"neither regions nor captions, .* objective=mm_gem"):
        getattr(Embedder(model, processor, FusionConfig()), method)(Image.new("RGB", (56, 56)), BOXES)


def test_a_model_learns_to_say_what_it_sees_in_an_image_and_in_its_regions(tmp_path: Path) -> None:
    """From nothing, in a hundred steps of one chunk: the prefix of a row is all that tells its caption."""
    colors = ("red", "green", "blue", "black")
    corners = ((0, 0), (56, 0), (0, 56), (56, 56))
    picture = Image.new("RGB", (112, 112))
    for color, corner in zip(colors, corners, strict=True):
        picture.paste(color, (*corner, corner[0] + 56, corner[1] + 56))
    boxes = [(float(x), float(y), x + 56.0, y + 56.0) for x, y in corners]
    BUILDERS["qwen2_vl"](tmp_path)
    torch.manual_seed(0)
    model = model_of(tmp_path)
    processor = processor_of(tmp_path)
    whole = as_item(picture)
    regions = [replace(whole, box=box, caption=color) for box, color in zip(boxes, colors, strict=True)]
    inputs = processor([replace(whole, caption="four colours"), *regions])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        encoded = model(inputs)
        optimizer.zero_grad()
        (encoded["caption_nll"].sum() / encoded["caption_tokens"].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    embedder = Embedder(model, processor, FusionConfig(), objective=OBJECTIVE)
    for num_beams in (1, 3):
        assert embedder.caption(picture, num_beams=num_beams) == ["four colours"]
        assert embedder.caption(picture, boxes[::-1], num_beams=num_beams) == list(colors[::-1])
