from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from agff.backbone import load_backbone
from agff.batch import MMEB_TEXTS, Item, TextRule
from agff.embedder import Embedder, as_item
from agff.embedding_model import EmbeddingModel
from agff.errors import DataError
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.release import MIN_COSINE, load
from agff.release_writer import save_release
from agff.similarity import FusionConfig
from data_pipeline.layouts.mmeb_eval import read_eval_set
from data_pipeline.layouts.mmeb_sets import MMEB_SETS
from data_pipeline.layouts.mmeb_train import read_pairs
from data_pipeline.layouts.training_rows import Pair
from tests.drawings import tiny_backbone

PROMPTS = PromptConfig(num_fine=2, tokens_per_prompt=2)
IMAGE = Image.new("RGB", (56, 56), "red")
TARGET = "<|image_1|>\nRepresent the given image.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


def embedder_of(folder: Path, *, max_tokens: int = 512, texts: TextRule = MMEB_TEXTS) -> Embedder:
    torch.manual_seed(0)
    processor = ItemProcessor.from_folder(
        folder, prompts=PROMPTS, limits=ProcessorConfig(max_tokens=max_tokens)
    )
    model = EmbeddingModel(load_backbone(folder, dtype=torch.float32, attention="sdpa"), PROMPTS)
    torch.nn.init.normal_(model.prompted_embedding.vectors)
    return Embedder(model, processor, FusionConfig(), texts=texts)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return embedder_of(folder)


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(embedder: Embedder) -> None:
    items = [
        "a heart",
        IMAGE,
        {"text": "what is it?", "image": IMAGE},
        {"text": "<|image_1|>\nx", "image": IMAGE},
    ]
    together = embedder.encode(items, batch_size=4)
    assert together.shape == (4, 3, 32)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4, 3))
    alone = torch.cat([embedder.encode([item]) for item in items])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, embedder.encode(items, batch_size=3), rtol=0, atol=1e-5)
    assert embedder.similarity(together, together).shape == (4, 4)
    with pytest.raises(ValueError, match="batch_size=0 must be >= 1"):
        embedder.encode(items, batch_size=0)


def test_weights_hash_follows_the_weights(folder: Path) -> None:
    embedder = embedder_of(folder)
    before = embedder.weights_sha256
    torch.nn.init.zeros_(embedder.model.prompted_embedding.vectors)
    assert embedder.weights_sha256 != before


def test_weights_read_in_bfloat16_give_nearly_the_same_vectors(folder: Path) -> None:
    """Positions stay in float32: rounded ones would turn every vector."""
    embedder, items = embedder_of(folder), ["a red heart", IMAGE, "a text of some more words than that"]
    whole = embedder.encode(items)
    buffers = {name: buffer.clone() for name, buffer in embedder.model.named_buffers()}
    embedder.read_in_bfloat16()
    assert {each.dtype for each in embedder.model.parameters()} == {torch.bfloat16}
    assert embedder.dtype == torch.bfloat16
    for name, buffer in embedder.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    rounded = embedder.encode(items)
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(whole, rounded, dim=-1).min() > MIN_COSINE["bfloat16"]


class Column:
    """Iterable and sized, but no Sequence: as pandas.Series."""

    def __init__(self, values: list[str]) -> None:
        self.values = values

    def __iter__(self) -> Any:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)


CONTAINERS: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda texts: (text for text in texts),
    "dict keys": lambda texts: dict.fromkeys(texts).keys(),
    "array": np.array,
    "array of objects": lambda texts: np.array(texts, dtype=object),
    "column": Column,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_whatever_holds_the_items_gives_the_same_embeddings(container: str, embedder: Embedder) -> None:
    texts = ["a red heart", "a dog", "two dogs"]
    torch.testing.assert_close(
        embedder.encode(CONTAINERS[container](texts), batch_size=2),
        embedder.encode(texts, batch_size=2),
        rtol=0,
        atol=0,
    )
    assert embedder.encode(CONTAINERS[container]([])).shape == (0, 3, 32)


def test_one_item_is_a_list_of_one(embedder: Embedder, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    IMAGE.save(path)
    for item in (
        "a red heart",
        np.array(["a red heart"])[0],
        {"text": "a red heart"},
        {"image": IMAGE},
        {"image": path, "text": "x"},
        path,
        IMAGE,
        Item(text="a red heart"),
    ):
        alone = embedder.encode(item)
        assert alone.shape == (1, 3, 32)
        torch.testing.assert_close(alone, embedder.encode([item]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (b"a red heart", "give a list of items, .*; found bytes"),
        (5, "give a list of items, .*; found int"),
        (np.array("a red heart"), "give a list of items, .*; found ndarray"),
        (None, "give a list of items, .*; found NoneType"),
        (pa.table({"text": ["a"]}), r"found Table; a table becomes a list by .to_dict\('records'\)"),
        (np.zeros((4, 4, 3)), r"items\[0\]: an item is a str .*, found ndarray"),
    ],
)
def test_what_holds_no_items(items: Any, message: str, embedder: Embedder) -> None:
    with pytest.raises(DataError, match=message):
        embedder.encode(items)


ODD = {
    "half a surrogate pair": ("bad \ud83d", r"text 'bad \\ud83d' holds half a surrogate pair at character 4"),
    "half a pair beside an image": ({"text": "\udc00", "image": IMAGE}, "holds half a surrogate pair"),
    "number": (5, "an item is a str .*, found int 5"),
    "number as text": ({"text": 5}, "a text must be a str, found int 5"),
    "no text": (None, "an item is a str .*, found NoneType None"),
    "not a number": (float("nan"), "an item is a str .*, found float nan"),
    "list": (["a", "b"], "an item is a str .*, found list"),
    "list as text": ({"text": ["a", "b"]}, r"a text must be a str, found list \['a', 'b'\]"),
    "bytes": (b"a", "an item is a str .*, found bytes"),
    "bytes as text": ({"text": b"a"}, "a text must be a str, found bytes"),
    "number as image": ({"image": 3}, "image must be a path or a PIL image, found int"),
    "array as image": ({"image": np.zeros((2, 2))}, "image must be a path or a PIL image, found ndarray"),
    "empty": ("", "neither text nor image"),
    "empty dict": ({}, "neither text nor image"),
    "empty values": ({"text": None, "image": None}, "neither text nor image"),
    "unknown keys": ({"picture": "a.png", 3: 4}, r"unknown keys \['picture', 3\]"),
    "placeholder without image": ({"text": "<|image_1|>\nx"}, "appears 1 times in text"),
    "two placeholders": ({"text": "<|image_1|><|image_1|>", "image": IMAGE}, "appears 2 times in text"),
    "image token": ("<|image_pad|>", r"holds the backbone's own image token <\|image_pad\|>"),
    "missing file": (Path("absent.png"), "absent.png: is missing"),
    "image in base64": (
        {"image": "iVBORw0KGgo" * 500},
        "iVBORw0KGgo.{289}: is not the name of a file: File name",
    ),
    "no image": ({"image": __file__, "text": "x"}, r"test_embedder.py: is text \('from __future__"),
    "thin image": (Image.new("RGB", (2000, 4)), "refuses the image: absolute aspect ratio must be smaller"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_item_is_named_by_its_position_and_what_it_is(name: str, embedder: Embedder) -> None:
    item, message = ODD[name]
    with pytest.raises(DataError, match=rf"^items\[3\]: .*{message}"):
        embedder.encode(["fine", "fine", IMAGE, item, "fine"], batch_size=2)


def test_all_odd_items_of_a_batch_are_named(embedder: Embedder) -> None:
    for items in (
        ["fine", 5, Path("absent.png"), "fine", ""],
        ["fine", "<|image_pad|>", Image.new("RGB", (2000, 4)), IMAGE, Image.new("RGB", (4, 2000))],
    ):
        with pytest.raises(DataError) as caught:
            embedder.encode(items)
        starts = [line.partition(":")[0] for line in str(caught.value).splitlines()]
        assert set(starts) <= {"items[1]", "items[2]", "items[4]"}
        assert len(starts) >= 2


def test_a_long_text_is_cut_as_the_contract_says_without_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = embedder_of(folder, max_tokens=40)
    embedder.processor.tokenizer.model_max_length = 30
    library = logging.getLogger("transformers")
    library.propagate, before = True, library.propagate
    try:
        with caplog.at_level(logging.WARNING):
            long = embedder.encode("a red heart " * 100)
    finally:
        library.propagate = before
    assert [record.getMessage() for record in caplog.records] == []
    torch.testing.assert_close(long, embedder.encode("a red heart " * 90), rtol=0, atol=0)
    assert embedder.processor([Item(text="a red heart " * 100)])["prompt_start_B"].tolist() == [
        40 - PROMPTS.num_tokens
    ]


def test_what_an_item_becomes(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    IMAGE.save(path)
    assert as_item("text") == Item(text="text")
    assert as_item({"text": "text\n"}) == Item(text="text\n"), "only the caller knows if it is an instruction"
    for image in (path, IMAGE, {"image": str(path)}, {"image": IMAGE.convert("RGBA"), "text": ""}):
        item = as_item(image)
        assert item.text == TARGET
        assert item.image is not None
        assert item.image.mode == "RGB"
        assert item.image.getpixel((3, 3)) == (255, 0, 0)
    turned = Image.new("RGB", (80, 40), "red")
    turned.getexif()[0x0112] = 6
    item = as_item(Item(text="<|image_1|>", image=turned))
    assert item.image is not None
    assert item.image.size == (40, 80), "a hand-made item is brought into shape too"


def test_an_image_has_one_text_in_training_evaluation_and_use(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        IMAGE.save(tmp_path / "images" / name)
    (tmp_path / "NIGHTS").mkdir()
    row = {"qry_text": "a\n", "qry_img_path": "", "tgt_text": ["", ""], "tgt_img_path": ["a.png", "b.png"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "NIGHTS/test.parquet")
    evaluated = read_eval_set(
        tmp_path, "NIGHTS", MMEB_SETS["NIGHTS"], images_root=None, max_queries=None
    ).items[1]
    (tmp_path / "S").mkdir()
    rows = [
        {
            "qry": "a\n",
            "qry_image_path": "",
            "pos_text": text,
            "pos_inst": inst,
            "pos_image_path": "images/a.png",
        }
        for text, inst in (("", ""), (TARGET, ""), ("", "Represent the given image."))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "S/original-00000-of-00001.parquet")
    trained = list(read_pairs(tmp_path, "S", split="original", start=0, stop=3))
    used = [
        as_item({"image": IMAGE}),
        as_item({"image": IMAGE, "text": "Represent the given image."}),
        as_item({"image": IMAGE, "text": "Represent the given image.\n"}),
        as_item({"image": IMAGE, "text": evaluated.text}),
    ]
    assert {
        evaluated.text,
        *(pair.target.text for pair in trained if isinstance(pair, Pair)),
        *(item.text for item in used),
    } == {TARGET}
    assert len(trained) == 3


def test_a_release_brings_its_own_rule_for_texts(folder: Path, tmp_path: Path) -> None:
    rule = TextRule(image_alone="<|image_1|>\n", image_with_text="{text} <|image_1|>")
    for number, texts in enumerate((MMEB_TEXTS, rule)):
        release = tmp_path / str(number)
        save_release(embedder_of(folder, texts=texts), release, origin={})
        loaded = load(release)
        assert loaded.texts == texts
        for value in (IMAGE, {"image": IMAGE, "text": "what?"}):
            complete = dataclasses.replace(as_item(value, texts), address="")
            torch.testing.assert_close(loaded.encode(value), loaded.encode(complete), rtol=0, atol=0)
    assert as_item(IMAGE, rule).text == "<|image_1|>\n"
