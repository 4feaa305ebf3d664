"""sentence-transformers folders: their vectors text by text, and what is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agff.batch import Item
from agff.errors import ConfigError
from launcher.embedding.sentence_model import PoolingMode, SentenceModel, pool, read_settings
from tests.launcher.embedding.sentence_folders import write_sentence_model

CPU = torch.device("cpu")
TEXTS = ["red heart", "  two blue circle in top ", "it", "", "one two " * 20]
"""Of different lengths; the last is longer than the model's 12 tokens."""
POOLINGS: dict[PoolingMode, dict[str, Any]] = {
    "mean": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    "cls": {"pooling_mode_cls_token": True},
    "max": {"pooling_mode_max_tokens": True, "pooling_mode_mean_sqrt_len_tokens": False},
    "lasttoken": {"pooling_mode": "lasttoken", "include_prompt": True},  # as version 6 writes it
}


def states_of(folder: Path, text: str, max_tokens: int) -> Tensor:
    """(T, 8) of a text alone, without any padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer([text.strip()], truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0]


def slow_pool(states_TH: Tensor, mode: PoolingMode) -> Tensor:
    match mode:
        case "mean":
            return sum(states_TH) / len(states_TH)  # type: ignore[return-value]
        case "max":
            return torch.stack([max(column) for column in states_TH.T])
        case "cls":
            return states_TH[0]
        case "lasttoken":
            return states_TH[-1]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_each_text_has_the_vector_that_it_has_alone(
    tmp_path: Path, mode: PoolingMode, padding_side: str
) -> None:
    folder = write_sentence_model(tmp_path / "m", pooling=POOLINGS[mode], padding_side=padding_side)
    model = SentenceModel(folder, CPU)
    found = model.encode([Item(text=text) for text in TEXTS], batch_size=2)
    assert found.shape == (len(TEXTS), model.dim)
    for text, vector in zip(TEXTS, found, strict=True):
        states_TH = states_of(folder, text, 12)
        if text == TEXTS[-1]:
            assert len(states_TH) == 12
        expected = torch.nn.functional.normalize(slow_pool(states_TH, mode), dim=0)
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", POOLINGS)
def test_what_is_padding_is_never_pooled(mode: PoolingMode) -> None:
    states_BTH, is_token_BT = torch.randn(2, 5, 3), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    found = pool(states_BTH.masked_fill(~is_token_BT[..., None], 99.0), is_token_BT, mode)
    for row in range(2):
        torch.testing.assert_close(found[row], slow_pool(states_BTH[row][is_token_BT[row]], mode))


def test_without_normalize_vectors_keep_their_length(tmp_path: Path) -> None:
    folder = write_sentence_model(tmp_path / "m", modules=("Transformer", "Pooling"))
    vector = SentenceModel(folder, CPU).encode([Item(text="red heart")], batch_size=1)[0]
    np.testing.assert_allclose(vector, states_of(folder, "red heart", 12).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert abs(np.linalg.norm(vector) - 1) > 0.1


def test_length_prompt_and_case_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = write_sentence_model(
        tmp_path / "m",
        transformer={"max_seq_length": None, "do_lower_case": True},
        prompts={"prompts": {"query": "say: "}, "default_prompt_name": "query"},
    )
    found = SentenceModel(folder, CPU).encode([Item(text="RED " + "one " * 30)], batch_size=1)[0]
    states_TH = states_of(folder, "say: red " + "one " * 30, 24)
    assert len(states_TH) == 24, "what the tokenizer allows"
    np.testing.assert_allclose(
        found, torch.nn.functional.normalize(states_TH.mean(dim=0), dim=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, r"the module sentence_transformers.models.Dense"),
        ({"package": "custom_st"}, "the module custom_st.Transformer"),
        ({"modules": ("Transformer", "Normalize")}, "the modules Transformer, Normalize"),
        ({"pooling": {"pooling_mode_mean_sqrt_len_tokens": True}}, "pooling_mode_mean_sqrt_len_tokens"),
        (
            {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
            "the pooling mean with cls",
        ),
        ({"pooling": {"pooling_mode": "weightedmean"}}, "the pooling weightedmean"),
        ({"pooling": {}}, "the pooling of nothing"),
        ({"transformer": {"transformer_task": "fill-mask"}}, "transformer_task fill-mask"),
        (
            {
                "pooling": {"pooling_mode_mean_tokens": True, "include_prompt": False},
                "prompts": {"prompts": {"query": "say: "}, "default_prompt_name": "query"},
            },
            "include_prompt false",
        ),
    ],
)
def test_what_is_not_done_here_is_refused_by_its_name(
    tmp_path: Path, choices: dict[str, Any], message: str
) -> None:
    folder = write_sentence_model(tmp_path / "m", **choices)
    with pytest.raises(ConfigError, match=rf"^{folder}: .*{message}.* is not done here; a teacher is"):
        SentenceModel(folder, CPU)


def without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


def weights_without_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layer.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def damaged_modules(folder: Path) -> None:
    (folder / "modules.json").write_text("[")


def no_pooling_file(folder: Path) -> None:
    (folder / "1_Pooling/config.json").unlink()


def remote_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "new", "auto_map": {"AutoModel": "code.NewModel"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_safetensors, "no \\*.safetensors there; pickled weights are not opened"),
        (damaged_weights, "cannot load the teacher"),
        (weights_without_a_layer, "the weights lack 16 parameters of the model, encoder.layer.1"),
        (damaged_modules, "modules.json: cannot be read"),
        (no_pooling_file, "1_Pooling/config.json: cannot be read"),
        (remote_code, "cannot load the teacher"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write_sentence_model(tmp_path / "m")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        SentenceModel(folder, CPU)


TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
ODD = {
    "modules that are texts": ("modules.json", ["a", "b"]),
    "modules by name": ("modules.json", {"a": TRANSFORMER}),
    "a module without a path": ("modules.json", [TRANSFORMER, {"type": POOLING["type"]}]),
    "nested modules": ("modules.json", "["),
    "pooling as a list": ("1_Pooling/config.json", [1]),
    "two poolings": ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}),
    "settings as a list": ("sentence_bert_config.json", [1]),
    "a length that is a text": ("sentence_bert_config.json", {"max_seq_length": "12"}),
    "a length of 0": ("sentence_bert_config.json", {"max_seq_length": 0}),
    "a prompt that is not there": ("config_sentence_transformers.json", {"default_prompt_name": "q"}),
    "a prompt that is no text": (
        "config_sentence_transformers.json",
        {"default_prompt_name": "q", "prompts": {"q": None}},
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_files_that_sentence_transformers_would_not_write_are_refused(tmp_path: Path, case: str) -> None:
    name, values = ODD[case]
    folder = write_sentence_model(tmp_path / "m")
    (folder / name).write_text("[" * 100_000 if values == "[" else json.dumps(values))
    with pytest.raises(ConfigError, match=rf"^{folder}.*; download .*again"):
        read_settings(folder)


@pytest.mark.parametrize("path", ["../m2", "/etc", "1_Pooling/../../m2"])
@pytest.mark.parametrize("module", [0, 1])
def test_a_module_outside_of_the_folder_is_refused(tmp_path: Path, path: str, module: int) -> None:
    folder = write_sentence_model(tmp_path / "m")
    write_sentence_model(tmp_path / "m2")
    modules = [dict(TRANSFORMER), dict(POOLING)]
    modules[module]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="leaves the folder; all modules must lie in it"):
        read_settings(folder)


def test_the_identity_is_of_the_content(tmp_path: Path) -> None:
    one = SentenceModel(write_sentence_model(tmp_path / "one"), CPU).identity
    assert SentenceModel(write_sentence_model(tmp_path / "two"), CPU).identity == one
    other = write_sentence_model(tmp_path / "other", transformer={"max_seq_length": 8})
    assert SentenceModel(other, CPU).identity != one
