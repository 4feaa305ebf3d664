"""A release in plain transformers: its weights, tokens and chat template make our vectors, without our code.

With transformers' own image and video processors and sentence-transformers: tests/ecosystem.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agff.batch import TextRule
from agff.chat_template import ALL_VECTORS
from agff.contract import read_contract
from agff.embedder import AnyItem
from agff.families import FAMILIES
from agff.model_card import model_card
from agff.release import load
from agff.release_writer import save_release
from tests.agff.family_folders import BUILDERS
from tests.agff.family_releases import items, trained_embedder

RULE = TextRule(image_alone="<|image_1|>Näme it: \"'\\\n", image_with_text="{text}\n\n<|image_1|> - é")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[Path, Tensor]]:
    @cache
    def write(family: str, lora: bool) -> tuple[Path, Tensor]:
        folder = tmp_path_factory.mktemp(family)
        embedder = trained_embedder(family, folder / "backbone", lora=lora)
        if lora:
            embedder.texts = RULE
        expected_NMD = embedder.encode(list(items().values()))
        save_release(embedder, folder / "release", origin={})
        return folder / "release", expected_NMD

    return write


def message(item: AnyItem) -> dict[str, Any]:
    """The item as users of chat templates write it."""
    if isinstance(item, str):
        return {"role": "user", "content": item}
    parts = item if isinstance(item, dict) else {"image": item}
    return {"role": "user", "content": [{"type": kind, kind: value} for kind, value in parts.items()]}


class PlainTransformers:
    """What transformers alone loads of a backbone folder."""

    def __init__(self, backbone: Path) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(backbone)
        self.model = AutoModel.from_pretrained(backbone).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(backbone, backend="pil")
        self.family = FAMILIES[self.model.config.model_type].of_config(self.model.config)

    def states_of(self, item: AnyItem, *, system: str) -> tuple[Tensor, list[int]]:
        """(T, H) last states of an item, normalised, and its tokens."""
        conversation = [{"role": "system", "content": system}, message(item)]
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
        pixels = {}
        if not isinstance(item, str):
            image = item["image"] if isinstance(item, dict) else item
            pixels = dict(self.image_processor([image], return_tensors="pt"))
            before, token, behind = text.partition(self.family.image_token)
            text = before + token * self.family.num_image_tokens(pixels)[0] + behind
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if "image_grid_thw" in pixels:
            pixels["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        with torch.no_grad():
            states_TH = self.model(input_ids=ids, **pixels).last_hidden_state[0]
        return torch.nn.functional.normalize(states_TH, dim=-1), ids[0].tolist()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", BUILDERS)
def test_transformers_alone_makes_the_vectors_of_a_release(
    released: Callable[[str, bool], tuple[Path, Tensor]], family: str, lora: bool
) -> None:
    folder, expected_NMD = released(family, lora)
    mask = json.loads((folder / "1_MultiVectorMask/config.json").read_text())
    plain = PlainTransformers(folder / "backbone")
    for (name, item), expected_MD in zip(items().items(), expected_NMD, strict=True):
        states_TH, ids = plain.states_of(item, system=ALL_VECTORS)
        places = [place for place, token in enumerate(ids) if token in mask["keep_only_token_ids"]]
        assert places == list(range(len(ids) - 5, len(ids), 2)), (
            "three prompts of two tokens, their last ones"
        )
        torch.testing.assert_close(states_TH[places], expected_MD, rtol=0, atol=1e-5, msg=name)
        states_TH, _ = plain.states_of(item, system="")
        torch.testing.assert_close(states_TH[-1], expected_MD[0], rtol=0, atol=1e-5, msg=f"{name}, global")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", BUILDERS)
def test_rows_in_the_vocabulary_change_nothing_here(
    released: Callable[[str, bool], tuple[Path, Tensor]], family: str, lora: bool
) -> None:
    """Also of a text that spells a prompt's token."""
    folder, expected_NMD = released(family, lora)
    loaded = load(folder)
    torch.testing.assert_close(loaded.encode(list(items().values())), expected_NMD, rtol=0, atol=1e-5)
    ids = loaded.processor.tokenize("<|agff_prompt_0|>")
    assert len(ids) > 1
    assert not {*ids} & {
        *json.loads((folder / "1_MultiVectorMask/config.json").read_text())["keep_only_token_ids"]
    }


@pytest.mark.parametrize("family", BUILDERS)
def test_unused_rows_are_taken_before_the_table_grows(
    released: Callable[[str, bool], tuple[Path, Tensor]], family: str
) -> None:
    folder, _ = released(family, False)
    before = json.loads((folder.parent / "backbone/config.json").read_text())["text_config"]["vocab_size"]
    after = json.loads((folder / "backbone/config.json").read_text())["text_config"]["vocab_size"]
    num_tokens = {"llava_onevision": 514}.get(family, before)
    assert after == max(before, num_tokens + 6)
    (table_VH,) = (
        tensor
        for name, tensor in load_file(folder / "backbone/model.safetensors").items()
        if "embed_tokens" in name
    )
    assert len(table_VH) == after
    vectors_PH = load_file(folder / "prompts.safetensors")["vectors"]
    assert torch.equal(table_VH[num_tokens : num_tokens + 6], vectors_PH)
    # nothing else of the release is a second copy of the weights
    assert [path.name for path in folder.rglob("*.safetensors")].count("model.safetensors") == 1
    assert not any(path.is_symlink() for path in folder.rglob("*"))


REFUSED = {
    "an item is one user message; found user, assistant": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    "an item is one user message; found user, user": [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
    ],
    "queries are encoded as documents are: call encode_document or encode": [
        {"role": "system", "content": "encode_query"},
        {"role": "user", "content": "a"},
    ],
    "an item has no system message or prompt; an instruction belongs in its text": [
        {"role": "system", "content": "Represent it"},
        {"role": "user", "content": "a"},
    ],
    "an item has text and image; found video": [{"role": "user", "content": [{"type": "video"}]}],
    "an item has one image; found 2": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
    r"the text holds <\|image_1\|>, which is there once": [{"role": "user", "content": "<|image_1|>"}],
    r"<\|image_1\|>, which is there once, for the image": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<|image_1|><|image_1|>"}]}
    ],
    r"the text spells the control token <\|im_end\|>": [{"role": "user", "content": "a<|im_end|>"}],
    r"the text spells the control token <\|agff_prompt_1\|>": [
        {"role": "user", "content": "<|agff_prompt_1|>"}
    ],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_model_was_not_trained_on_is_refused(
    released: Callable[[str, bool], tuple[Path, Tensor]], reason: str
) -> None:
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(released("qwen2_vl", False)[0] / "backbone")
    with pytest.raises(TemplateError, match=reason):
        tokenizer.apply_chat_template(REFUSED[reason], tokenize=False)


def test_the_card_says_how_other_libraries_load_it(
    released: Callable[[str, bool], tuple[Path, Tensor]],
) -> None:
    folder, _ = released("qwen2_vl", False)
    card = (folder / "README.md").read_text()
    for line in (
        'MultiVectorEncoder("this folder")',
        'SentenceTransformer("this folder/backbone")',
        'AutoModel.from_pretrained("this folder/backbone")',
    ):
        assert line in card
    contract = read_contract(folder)
    assert {"modules.json", "backbone/modules.json", "backbone/chat_template.jinja"} <= contract.files.keys()
    contract.files.pop("modules.json")
    assert "SentenceTransformer" not in model_card(contract)
