"""A sentence-transformers folder of our own: a BERT of 8 dimensions with a vocabulary of a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ("red", "heart", "one", "two", "circle", "square", "blue", "in", "top", "bottom", "say", "it", ":")
MODULES = ("Transformer", "Pooling", "Normalize")


def write_sentence_model(
    folder: Path,
    *,
    modules: tuple[str, ...] = MODULES,
    pooling: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    package: str = "sentence_transformers.models",
    padding_side: str = "right",
) -> Path:
    """The folder as sentence-transformers writes one; each of its files can be another."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    model = BertModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), padding_side=padding_side, model_max_length=24)
    tokenizer.save_pretrained(folder)
    paths = ["" if name == "Transformer" else f"{index}_{name}" for index, name in enumerate(modules)]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"{package}.{name}"}
        for index, (name, path) in enumerate(zip(modules, paths, strict=True))
    ]
    _write(folder / "modules.json", listed)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 12, **(transformer or {})})
    pooling = pooling if pooling is not None else {"pooling_mode_mean_tokens": True}
    _write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 8, **pooling})
    if prompts is not None:
        _write(folder / "config_sentence_transformers.json", prompts)
    return folder


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
