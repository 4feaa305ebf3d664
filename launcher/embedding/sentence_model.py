"""A sentence-transformers folder, read with transformers alone: Transformer, Pooling and perhaps Normalize.

No code of the folder is run and no pickle is opened. What the folder asks for and is not done here is refused
by its name: other vectors under the model's name would be worse than none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from agff.batch import Item
from agff.errors import ConfigError
from agff.files import sha256_of

MODULES_FILE = "modules.json"
PoolingMode = Literal["mean", "cls", "lasttoken", "max"]
_POOLING_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
}
_MODULES = ("Transformer", "Pooling", "Normalize")
_TRANSFORMER_FILE = "sentence_bert_config.json"
_PROMPTS_FILE = "config_sentence_transformers.json"


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """What the folder's own files say beside the weights."""

    transformer: Path
    """Folder of weights and tokenizer."""
    pooling: PoolingMode
    normalizes: bool
    max_tokens: int | None
    """None: what the model's configuration and tokenizer allow."""
    lowers_case: bool
    prompt: str
    """In front of every text; "" for none."""


class SentenceModel:
    """The teacher of the folder (launcher/embedding/teacher.py). Takes texts alone."""

    seen_pixels: int | None = None

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises ConfigError when the folder is not complete, or asks for what is not done here."""
        self._settings = read_settings(folder)
        self._tokenizer, self._model = _load(self._settings.transformer)
        self._model.eval().to(device)
        self._device = device
        self._max_tokens = self._settings.max_tokens or _longest(self._model.config, self._tokenizer)
        self.identity = f"{self._model.config.model_type}, files sha256 {_files_sha256(folder)}"
        self.dim = self.encode([Item(text="a")], batch_size=1).shape[1]

    def encode(self, items: Sequence[Item], *, batch_size: int) -> NDArray[np.float32]:
        """(N, E) vectors of the texts; what is beyond the model's length is cut."""
        texts = self._texts(items)
        parts = [
            self._encode(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts).numpy()

    def num_cut(self, items: Sequence[Item]) -> int:
        """See Teacher."""
        if not items:
            return 0
        ids = self._tokenizer(self._texts(items), truncation=False, verbose=False).input_ids
        return sum(len(each) > self._max_tokens for each in ids)

    def _texts(self, items: Sequence[Item]) -> list[str]:
        texts = [self._settings.prompt + item.text.strip() for item in items]
        return [text.lower() for text in texts] if self._settings.lowers_case else texts

    def _encode(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            states_BTH = self._model(**inputs).last_hidden_state.float()
            vectors_BE = pool(states_BTH, inputs["attention_mask"].bool(), self._settings.pooling)
            if self._settings.normalizes:
                vectors_BE = functional.normalize(vectors_BE, dim=1)
        return vectors_BE.cpu()


def pool(states_BTH: Tensor, is_token_BT: Tensor, mode: PoolingMode) -> Tensor:
    """(B, H) one state of a text's tokens, wherever its padding is."""
    if mode == "mean":
        weight_BT1 = is_token_BT[..., None].to(states_BTH.dtype)
        return (states_BTH * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp(min=1e-9)
    if mode == "max":
        return states_BTH.masked_fill(~is_token_BT[..., None], -torch.inf).amax(dim=1)
    place_T = torch.arange(is_token_BT.shape[1], device=is_token_BT.device)
    if mode == "cls":
        place_B = torch.where(is_token_BT, place_T, len(place_T)).amin(dim=1)
    else:
        place_B = torch.where(is_token_BT, place_T, -1).amax(dim=1)
    return states_BTH[torch.arange(len(states_BTH), device=states_BTH.device), place_B]


def read_settings(folder: Path) -> SentenceSettings:
    """From the folder's JSON files. Raises ConfigError with the name of what is not done here, or of what
    sentence-transformers would not write."""
    try:
        return _settings(folder)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}: its JSON files are not those of a sentence-transformers folder: {error!r}; download "
            "it again"
        ) from None


def _settings(folder: Path) -> SentenceSettings:
    """Raises what Python does on values of another kind."""
    modules = _read(folder / MODULES_FILE)
    kinds = [_kind(folder, module) for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _refused(folder, f"the modules {', '.join(kinds) or 'none'}")
    transformer = _inside(folder, modules[0].get("path", ""))
    own = _read(transformer / _TRANSFORMER_FILE) if (transformer / _TRANSFORMER_FILE).exists() else {}
    if (task := own.get("transformer_task", "feature-extraction")) != "feature-extraction":
        raise _refused(folder, f"transformer_task {task}")
    pooling = _read(_inside(folder, modules[1]["path"]) / "config.json")
    max_tokens = own.get("max_seq_length")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_seq_length {max_tokens!r}")
    return SentenceSettings(
        transformer=transformer,
        pooling=_pooling_mode(folder, pooling),
        normalizes="Normalize" in kinds,
        max_tokens=max_tokens,
        lowers_case=bool(own.get("do_lower_case")),
        prompt=_prompt(folder, pooling),
    )


def _inside(folder: Path, path: str) -> Path:
    """A module's folder. Raises ConfigError for one elsewhere: its files would not be in the identity."""
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ConfigError(
            f"{folder / MODULES_FILE}: the path {path!r} leaves the folder; all modules must lie in it"
        )
    return folder / relative


def _kind(folder: Path, module: Mapping[str, Any]) -> str:
    """Transformer, Pooling, Normalize: the last part of a class of sentence-transformers."""
    package, _, name = str(module.get("type")).rpartition(".")
    if package.split(".")[0] != "sentence_transformers" or name not in _MODULES:
        raise _refused(folder, f"the module {module.get('type')}")
    return name


def _pooling_mode(folder: Path, pooling: Mapping[str, Any]) -> PoolingMode:
    """One flag of several, or since version 5 perhaps their name."""
    named = pooling.get("pooling_mode")
    chosen = [named] if named else [flag for flag in pooling if "pooling_mode_" in flag and pooling[flag]]
    found = [_POOLING_FLAGS.get(flag, flag) for flag in chosen]
    known = [mode for mode in _POOLING_FLAGS.values() if found == [mode]]
    if not known:
        raise _refused(folder, f"the pooling {' with '.join(map(str, found)) or 'of nothing'}")
    return known[0]


def _prompt(folder: Path, pooling: Mapping[str, Any]) -> str:
    path = folder / _PROMPTS_FILE
    values = _read(path) if path.exists() else {}
    name = values.get("default_prompt_name")
    if name is None:
        return ""
    if not pooling.get("include_prompt", True):
        raise _refused(folder, "include_prompt false")
    prompt = values["prompts"][name]
    if not isinstance(prompt, str):
        raise TypeError(f"prompt {name!r} is {prompt!r:.60}")
    return prompt


def _refused(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder}: {what} is not done here; a teacher is Transformer, Pooling (mean, cls, lasttoken or max) "
        "and perhaps Normalize: choose another model"
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; download the folder again") from None


def _load(folder: Path) -> tuple[Any, Any]:
    """(tokenizer, model in the number format of its weights)."""
    from transformers import AutoModel, AutoTokenizer

    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder}: no *.safetensors there; pickled weights are not opened, since they can run anything"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            padding_side="right",  # a text then has the positions that it has alone
        )
        model, found = AutoModel.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"{folder}: cannot load the teacher: {reason}") from None
    # BERT's own pooler is not used here
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
        raise ConfigError(
            f"{folder}: the weights lack {len(missing)} parameters of the model, {', '.join(missing[:3])}; "
            "they would start at random: download the folder again"
        )
    return tokenizer, model


def _longest(config: Any, tokenizer: Any) -> int:
    """As sentence-transformers has it where the folder does not say."""
    return min(getattr(config, "max_position_embeddings", 512), tokenizer.model_max_length)


def _files_sha256(folder: Path) -> str:
    """Of what decides the vectors: weights, tokenizer, settings."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model") and path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
