"""What the adapter makes of rows, without mteb; tests/ecosystem/test_mteb.py runs the harness itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from agff.backbone import load_backbone
from agff.batch import MMEB_TEXTS, Item, TextRule
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError, ConfigError, DataError
from agff.mteb_model import MtebModel
from agff.nested import Truncations
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.release_writer import save_release
from agff.similarity import FusionConfig
from data_pipeline.layouts.eval_items import UniqueItems
from tests.drawings import tiny_backbone

PROMPTS = PromptConfig(num_fine=2)
IMAGE = Image.new("RGB", (56, 56), "red")
RETRIEVAL, PAIRS = "retrieval", "pair-classification"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("mteb_model") / "backbone")


def release_of(backbone: Path, out: Path, *, texts: TextRule = MMEB_TEXTS) -> Path:
    torch.manual_seed(0)
    processor = ItemProcessor.from_folder(backbone, prompts=PROMPTS, limits=ProcessorConfig())
    model = EmbeddingModel(load_backbone(backbone, dtype=torch.float32, attention="sdpa"), PROMPTS)
    torch.nn.init.normal_(model.prompted_embedding.vectors)
    truncations = Truncations(dims=[8], fine=[0])
    save_release(
        Embedder(model, processor, FusionConfig(), texts=texts, truncations=truncations), out, origin={}
    )
    return out


@pytest.fixture(scope="module")
def release(backbone: Path) -> Path:
    return release_of(backbone, backbone.parent / "release")


@pytest.fixture(scope="module")
def model(release: Path) -> MtebModel:
    return MtebModel(release)


def encode(
    model: MtebModel,
    *batches: Mapping[str, Sequence[Any]],
    role: str | None = "query",
    prompt: Any = None,
    kind: str = RETRIEVAL,
    **choices: Any,
) -> np.ndarray:
    task = SimpleNamespace(name="Task", prompt=prompt, simplified_task_type=kind)
    return model.encode(
        batches,  # type: ignore[arg-type]
        task_metadata=task,
        hf_split="test",
        hf_subset="default",
        prompt_type=role,  # type: ignore[arg-type]
        **choices,
    )


CELLS: dict[str, tuple[str, str, bool]] = {
    "text": ("qry", "a dog", False),
    "complete query": ("qry", "Find a photo of a dog\n", False),
    "image": ("qry", "", True),
    "complete image and text": ("qry", "<|image_1|>\nWhat is it?\n", True),
    "placeholder without image": ("qry", "<|image_1|>\nWhat is it?\n", False),
    "target text": ("tgt", "a dog", False),
    "target that ends in a line break": ("tgt", "a dog\n", False),
    "target image": ("tgt", "", True),
    "complete target image": ("tgt", "<|image_1|>\nRepresent the given image.\n", True),
}
"""Of MMEB's tables: role, text, whether there is an image."""
WAYS = ("prompt of each side", "prompt of queries", "column")


@pytest.mark.parametrize("instruction", [None, "", "Find it."])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cells", CELLS)
def test_an_item_is_what_our_layout_makes_of_the_same_cells(
    cells: str, way: str, instruction: str | None, model: MtebModel, tmp_path: Path
) -> None:
    side, text, has_image = CELLS[cells]
    if way == "prompt of queries" and side == "tgt":
        instruction = None
    items = UniqueItems((tmp_path,))
    IMAGE.save(tmp_path / "a.png")
    items.add(side, instruction, text, "a.png" if has_image else "", "row")
    assert not items.findings
    role = {"qry": "query", "tgt": "document"}[side]
    prompt: Any = None
    row: dict[str, list[Any]] = {"id": ["7"], "text": [text.strip() if side == "tgt" else text]}
    if side == "tgt":
        row["body"] = [text]  # as mteb does
    if has_image:
        row["image"] = [IMAGE]
    if way == "column" and instruction is not None:
        row["instruction"] = [instruction]
        if side == "qry":
            row |= {"query": [text], "text": [f"{text} {instruction}"]}
        prompt = "the row's own takes precedence"
    elif instruction is not None:
        prompt = instruction if way == "prompt of queries" else {role: instruction}
    expected = Item(text=items.items[0].text, image=IMAGE if has_image else None)
    found = encode(model, row, role=role, prompt=prompt)
    assert_close(torch.as_tensor(found), model.embedder.encode(expected), rtol=0, atol=0)


def test_a_prompt_of_the_queries_is_said_of_no_other_item(
    model: MtebModel,
) -> None:
    for role in ("document", None):
        for prompt in ("Find it.", {"query": "Find it."}):
            for row, item in (({"text": ["a dog"]}, "a dog"), ({"image": [IMAGE]}, IMAGE)):
                found = encode(model, row, role=role, prompt=prompt)
                assert_close(torch.as_tensor(found), model.embedder.encode(item), rtol=0, atol=0)


def test_a_document_with_a_title_is_title_and_text(model: MtebModel) -> None:
    row = {"text": ["Dogs a dog"], "title": ["Dogs"], "body": ["a dog"]}
    expected = model.embedder.encode("Dogs a dog")
    assert_close(torch.as_tensor(encode(model, row, role="document")), expected, rtol=0, atol=0)


def test_an_image_gets_the_text_that_the_release_says(backbone: Path, tmp_path: Path) -> None:
    rule = TextRule(image_alone="<|image_1|>\n", image_with_text="{text} <|image_1|>")
    model = MtebModel(release_of(backbone, tmp_path / "release", texts=rule))
    found = encode(model, {"image": [IMAGE, IMAGE], "text": ["", "a dog"]}, prompt="Find")
    expected = [Item(text=text, image=IMAGE) for text in ("Find <|image_1|>", "Find a dog <|image_1|>")]
    assert_close(torch.as_tensor(found), model.embedder.encode(expected), rtol=0, atol=0)


def test_rows_keep_their_order_whatever_the_batches(model: MtebModel) -> None:
    texts = ["a dog", "two dogs", "", "a cat", "no cat"]
    whole = encode(model, {"text": texts})
    assert whole.shape == (5, 3, 32)
    assert whole.dtype == np.float32
    ones = [{"text": [text]} for text in texts]
    for batch_size in (1, 2, 32):
        found = encode(model, *ones, batch_size=batch_size)
        assert_close(found, whole, rtol=0, atol=1e-5)
    assert encode(model).shape == (0, 3, 32)


def test_tasks_of_one_vector_get_the_global_one_and_the_log_says_so(
    model: MtebModel, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"text": ["a dog", "two dogs"]}
    with caplog.at_level(logging.WARNING):
        assert_close(encode(model, row, role=None, kind=PAIRS), encode(model, row, role=None)[:, 0])
    assert "Task compares one vector an item: the global ones" in caplog.text


def test_shorter_embeddings_are_those_of_the_release(release: Path) -> None:
    short = MtebModel(release, dim=8, num_fine=0)
    found = encode(short, {"text": ["a dog"]})
    assert found.shape == (1, 8), "as caches and indexes of one vector an item want it"
    assert_close(torch.as_tensor(found), short.embedder.encode("a dog", dim=8, num_fine=0)[:, 0])
    with pytest.raises(ValueError, match="dim=9 was not trained"):
        MtebModel(release, dim=9)


@pytest.mark.parametrize("of", [np.asarray, torch.as_tensor])
def test_similarity_is_the_fused_one_of_whatever_encode_gave(
    model: MtebModel, of: Callable[[Any], Any]
) -> None:
    vectors = of(encode(model, {"text": ["a dog", "two dogs", "a cat"]}))
    wanted_33 = model.embedder.similarity(torch.as_tensor(vectors), torch.as_tensor(vectors))
    assert_close(model.similarity(vectors[:2], vectors), wanted_33[:2])
    pairs = model.similarity_pairwise(vectors, vectors[[1, 2, 0]])
    assert_close(pairs, wanted_33[[0, 1, 2], [1, 2, 0]])
    first, second = vectors[:, 0], vectors[[1, 2, 0], 0]
    cosine_33 = torch.as_tensor(first) @ torch.as_tensor(second).T
    assert_close(model.similarity(first, second), cosine_33)
    assert_close(model.similarity(first[0], second[1]), cosine_33[:1, 1:2])
    assert_close(model.similarity_pairwise(first, second), cosine_33.diagonal())
    with pytest.raises(ValueError, match=r"expected equal shapes, got .*3, 1, 32.* and .*2, 1, 32"):
        model.similarity_pairwise(first, second[:2])


def test_what_cannot_be_embedded_is_named_by_task_and_id(model: MtebModel) -> None:
    texts = ["fine", "<|image_pad|>", "fine", "<|image_pad|>"]
    with pytest.raises(DataError) as caught:
        encode(model, {"id": ["a", "b", "c", "d"], "text": texts})
    first, second = str(caught.value).splitlines()
    assert first.startswith("Task, query b: text '<|image_pad|>' holds the backbone's own image token")
    assert second.startswith("Task, query d: ")
    rows = {"image": [IMAGE, None, None, "absent.png"], "text": ["", " ", "a dog", ""]}
    with pytest.raises(DataError) as caught:
        encode(model, {"text": ["before"]}, rows, role="document")
    first, second = str(caught.value).splitlines()
    assert first == "Task, document 2: neither text nor image; the task's data set lacks them"
    assert second.startswith("Task, document 4: absent.png: is missing")


def test_what_the_model_cannot_see_or_give_is_refused(model: MtebModel) -> None:
    for column in ("audio", "video"):
        with pytest.raises(ConfigError, match=f"Task has {column}, the model sees text and images only"):
            encode(model, {"text": ["a dog"], column: [None]})
    with pytest.raises(ConfigError, match="precision=int8: the vectors are float32"):
        encode(model, {"text": ["a dog"]}, precision="int8")
    broken = MtebModel(model.folder)
    torch.nn.init.constant_(broken.embedder.model.prompted_embedding.vectors, float("nan"))
    with pytest.raises(CheckpointError, match="embeddings of Task are not finite"):
        encode(broken, {"text": ["a dog"]})


def test_the_revision_is_that_of_the_contract(backbone: Path, release: Path, tmp_path: Path) -> None:
    first = MtebModel(release).revision
    assert MtebModel(release, first).revision == first
    with pytest.raises(ConfigError, match=f"has revision {first}, not revision=main"):
        MtebModel(release, "main")
    texts = TextRule(image_alone="<|image_1|>")
    assert MtebModel(release_of(backbone, tmp_path / "release", texts=texts)).revision != first
