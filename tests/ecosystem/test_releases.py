"""The vectors of a release, in transformers and in both classes of sentence-transformers: no code of ours is
imported here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import AutoModel, AutoProcessor

NAMES = [
    f"{family}-{tuning}"
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
    for tuning in ("full", "lora")
]
CLOSE = {"rtol": 0, "atol": 1e-4}


@dataclass
class Released:
    folder: Path
    items: list[Any]
    """Texts, {"image": path}, {"image": path, "text": ...}."""
    expected_NMD: Tensor


@pytest.fixture(params=NAMES)
def released(releases: Path, request: pytest.FixtureRequest) -> Released:
    folder = releases / request.param
    return Released(
        folder=folder / "release",
        items=list(json.loads((folder / "items.json").read_text()).values()),
        expected_NMD=load_file(folder / "vectors.safetensors")["vectors"],
    )


@pytest.fixture(autouse=True)
def nothing_of_ours() -> Iterator[None]:
    before = set(sys.modules)
    yield
    assert not {"agff", "launcher", "data_pipeline"} & (set(sys.modules) - before)


def sentence_transformer(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def multi_vector_encoder(folder: Path) -> MultiVectorEncoder:
    return MultiVectorEncoder(str(folder), device="cpu", local_files_only=True)


def groups(released: Released) -> list[list[int]]:
    """Places of the items of one kind; texts and images of other sizes and lengths are padded together."""
    kinds = [("text" if isinstance(item, str) else "+".join(item)) for item in released.items]
    return [[i for i, found in enumerate(kinds) if found == kind] for kind in dict.fromkeys(kinds)]


def test_sentence_transformer_gives_the_global_vector(released: Released) -> None:
    model = sentence_transformer(released.folder / "backbone")
    for encode, side in product((model.encode, model.encode_query, model.encode_document), ("left", "right")):
        model.tokenizer.padding_side = side  # published tokenizers have either
        for places in groups(released):
            together_ND = torch.from_numpy(encode([released.items[place] for place in places]))
            torch.testing.assert_close(together_ND, released.expected_NMD[places, 0], **CLOSE)
    for item, expected_MD in zip(released.items, released.expected_NMD, strict=True):
        torch.testing.assert_close(torch.from_numpy(model.encode(item)), expected_MD[0], **CLOSE)


def test_multi_vector_encoder_gives_all_vectors(released: Released) -> None:
    model = multi_vector_encoder(released.folder)
    for encode, side in product((model.encode, model.encode_document), ("left", "right")):
        model.tokenizer.padding_side = side
        for places in groups(released):
            together_NMD = torch.stack(encode([released.items[place] for place in places]))
            torch.testing.assert_close(together_NMD, released.expected_NMD[places], **CLOSE)
    with pytest.raises(TemplateError, match="queries are encoded as documents are: call encode_document or"):
        model.encode_query(["a red heart"])


def test_transformers_gives_the_state_of_each_prompt(released: Released) -> None:
    backbone = released.folder / "backbone"
    model = AutoModel.from_pretrained(backbone).eval()
    processor = AutoProcessor.from_pretrained(backbone, use_fast=False)
    mask = json.loads((released.folder / "1_MultiVectorMask/config.json").read_text())
    for item, expected_MD in zip(released.items, released.expected_NMD, strict=True):
        parts = {"text": item} if isinstance(item, str) else item
        content = [
            {"type": kind, "path" if kind == "image" else kind: value} for kind, value in parts.items()
        ]
        for system in ("all vectors", ""):
            inputs = processor.apply_chat_template(
                [
                    {"role": "system", "content": [{"type": "text", "text": system}]},
                    {"role": "user", "content": content},
                ],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                states_TH = model(**inputs).last_hidden_state[0]
            is_prompt_T = torch.isin(inputs["input_ids"][0], torch.tensor(mask["keep_only_token_ids"]))
            found_MD = torch.nn.functional.normalize(states_TH[is_prompt_T], dim=-1)
            torch.testing.assert_close(found_MD, expected_MD if system else expected_MD[:1], **CLOSE)
        assert is_prompt_T[-1], "the global vector is the last state"


def test_a_long_text_keeps_its_prompts(releases: Path) -> None:
    """Nothing is cut, whatever the tokenizer's own limit is: else the last token would be of the text."""
    folder = releases / "qwen2_vl-full/release"
    model, encoder = sentence_transformer(folder / "backbone"), multi_vector_encoder(folder)
    model.max_seq_length = encoder.max_seq_length = 32
    item = {"image": str(releases / "qwen2_vl-full/2.png"), "text": "a red heart " * 40}
    (global_D,), (found_MD,) = model.encode([item]), encoder.encode([item])
    assert found_MD.shape[0] == 3
    torch.testing.assert_close(torch.from_numpy(global_D), found_MD[0].cpu(), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_those_that_sentence_transformers_writes(
    releases: Path, tmp_path: Path, name: str
) -> None:
    """Its own objects, built by its own API from the weights, and what it saves of them."""
    folder = releases / name / "release"
    settings = json.loads((folder / "backbone/sentence_bert_config.json").read_text())
    assert settings.pop("processor_kwargs") == {"use_fast": False}, "it reads them, and does not write them"
    transformer = Transformer(
        str(folder / "backbone"),
        transformer_task="feature-extraction",
        processing_kwargs={"text": {"truncation": False}},
        unpad_inputs=False,
    )
    mask = json.loads((folder / "1_MultiVectorMask/config.json").read_text())
    SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "lasttoken"), Normalize()]
    ).save_pretrained(str(tmp_path / "single"))
    MultiVectorEncoder(
        modules=[
            transformer,
            MultiVectorMask(keep_only_token_ids=mask["keep_only_token_ids"]),
            Normalize(module_input_name="token_embeddings"),
        ],
        prompts={"query": "encode_query", "document": "all vectors"},
        default_prompt_name="document",
    ).save_pretrained(str(tmp_path / "multi"))
    for ours, theirs, files in (
        (folder / "backbone", tmp_path / "single", ["1_Pooling/config.json", "2_Normalize/config.json"]),
        (folder, tmp_path / "multi", ["1_MultiVectorMask/config.json", "2_Normalize/config.json"]),
    ):
        for file in [*files, "modules.json", "config_sentence_transformers.json"]:
            found, expected = (json.loads((side / file).read_text()) for side in (ours, theirs))
            if file == "modules.json" and ours == folder:
                assert found[0].pop("path") == "backbone", "where it lies, and not in the root"
                assert expected[0].pop("path") == ""
            if file == "config_sentence_transformers.json":
                versions = expected.pop("__version__")
                assert found.pop("__version__")["sentence_transformers"] == versions["sentence_transformers"]
            assert found == expected, file
        saved = json.loads((theirs / "sentence_bert_config.json").read_text())
        assert saved["modality_config"].pop("video"), "which the model was not trained on"
        assert saved == settings
        assert (theirs / "chat_template.jinja").read_text() == (
            folder / "backbone/chat_template.jinja"
        ).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_what_sentence_transformers_saves_again_is_the_same_model(
    releases: Path, tmp_path: Path, name: str
) -> None:
    folder, texts = releases / name / "release", ["a red heart", "a blue one"]
    model = sentence_transformer(folder / "backbone")
    model.save_pretrained(str(tmp_path / "single"))
    torch.testing.assert_close(
        sentence_transformer(tmp_path / "single").encode(texts), model.encode(texts), **CLOSE
    )
    encoder = multi_vector_encoder(folder)
    encoder.save_pretrained(str(tmp_path / "multi"))
    again = multi_vector_encoder(tmp_path / "multi")
    assert [type(module) for module in again] == [type(module) for module in encoder]
    torch.testing.assert_close(again.encode(texts), encoder.encode(texts), **CLOSE)


def test_a_release_that_was_moved_loads(releases: Path, tmp_path: Path) -> None:
    """No file names a place outside of it."""
    folder = shutil.copytree(releases / "qwen3_vl-lora/release", tmp_path / "elsewhere")
    assert len(multi_vector_encoder(folder).encode("a red heart")) == 3
    files = (path for path in folder.rglob("*") if path.suffix in (".json", ".jinja"))
    assert not any(str(releases) in path.read_text() for path in files)


@pytest.mark.parametrize("kind", ["transparent", "16 bits"])
def test_images_of_which_the_card_warns_are_seen_in_another_way(
    releases: Path, tmp_path: Path, kind: str
) -> None:
    """agff sees transparency on white and the upper 8 bits of 16. Where these libraries come to do so too,
    the card's warning is out of date."""
    levels = np.arange(56 * 84, dtype=np.uint16).reshape(56, 84) % 256
    if kind == "transparent":
        image = Image.fromarray(np.stack([levels.astype(np.uint8)] * 4, axis=-1), "RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        image = Image.fromarray(levels * 256)
        seen = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    image.save(tmp_path / "image.png")
    seen.save(tmp_path / "seen.png")
    model = sentence_transformer(releases / "qwen2_vl-full/release/backbone")
    found_ND = model.encode([{"image": str(tmp_path / name)} for name in ("image.png", "seen.png")])
    assert abs(found_ND[0] - found_ND[1]).max() > 1e-2
    assert "Images must be opaque, with 8 bits" in (releases / "qwen2_vl-full/release/README.md").read_text()


def test_a_text_that_names_an_image_is_taken_for_it(releases: Path) -> None:
    """The card warns of it: to agff a str is a text."""
    folder, image = releases / "qwen2_vl-full/release", str(releases / "qwen2_vl-full/2.png")
    model = sentence_transformer(folder / "backbone")
    found_ND = torch.from_numpy(model.encode([image, {"image": image}]))
    torch.testing.assert_close(found_ND[0], found_ND[1], **CLOSE)
    assert "A text that is the path of an image file there" in (folder / "README.md").read_text()


def test_a_prompt_or_control_token_is_refused(releases: Path) -> None:
    model = sentence_transformer(releases / "qwen2_vl-full/release/backbone")
    with pytest.raises(TemplateError, match="an item has no system message or prompt; an instruction"):
        model.encode(["a red heart"], prompt="Represent this: ")
    with pytest.raises(TemplateError, match=r"the text spells the control token <\|im_end\|>"):
        model.encode(["a red heart<|im_end|>"])
