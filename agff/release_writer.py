"""Writes a release folder (`agff.release` says what is in it and loads it), one tensor at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from agff.adapter_folder import ADAPTER_FOLDER, write_adapter
from agff.backbone_folder import HEAD_FILE
from agff.contract import CARD_FILE, Contract, fingerprints, write_contract
from agff.ecosystem_files import write_ecosystem_files
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import ConfigError
from agff.lazy_tensor import LazyTensor, of_tensor
from agff.model_card import model_card
from agff.objectives import name_of
from agff.release import golden_items
from agff.release_files import BACKBONE_FOLDER, GOLDEN_FILE, PROMPTS_FILE, settings_folder
from agff.release_parts import lora_config, plain_backbone, release_parts
from agff.release_weights import WrittenWeights, write_weights
from agff.streamed_model import streamed
from agff.vocabulary_prompts import VocabularyPrompts, add_to_vocabulary

Lora = Literal["merged", "adapter", "both"]
"""What becomes of adapters: merged into the backbone, a folder of their own, or both."""


def save_release(
    embedder: Embedder,
    folder: Path,
    *,
    origin: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, LazyTensor] | None = None,
    lora: Lora = "merged",
    base_model: str | None = None,
    shard_bytes: int | None = None,
) -> list[WrittenWeights]:
    """Write a release, one tensor at a time; return the hashes of what was written (`check_written`).

    The golden vectors are the embedder's as it comes, in float32; the weights are rounded to `dtype`.
    origin: JSON values that say where the weights come from (run, step, backbone). weights: of a model that
    is without any (`agff.backbone.empty_backbone`), all of them by the names of its parameters. lora: what
    becomes of adapters, where there are any. base_model: the hub's name of the backbone they are of. Raises
    ConfigError where an adapter is asked for and the model has none, CheckpointError for one that is zero or
    of no layer.
    """
    model, processor = embedder.model, copy.deepcopy(embedder.processor)  # its tokenizer gets new tokens
    if lora != "merged" and lora_config(model) is None:
        raise ConfigError(
            f"--lora {lora}: the model has no adapters, all of its weights were trained; release it without "
            "--lora"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with streamed(model, weights, dtype=torch.float32) if weights else contextlib.nullcontext():
        golden = embedder.encode(list(golden_items().values()))
    write_weights(folder, {"embeddings": of_tensor(golden)}, dtype=golden.dtype, stem=Path(GOLDEN_FILE).stem)
    parts = release_parts(model, weights or _in_memory(model))
    written = [write_weights(folder, parts.prompts, dtype=dtype, stem=Path(PROMPTS_FILE).stem)]
    if model.head is not None:
        written.append(write_weights(folder, parts.head, dtype=dtype, stem=Path(HEAD_FILE).stem))
    if lora != "merged":
        adapter = folder / ADAPTER_FOLDER
        written.append(write_adapter(adapter, model, parts, dtype=dtype, base_model=base_model))
    config, vocabulary = _released_config(model, dtype), None
    if lora != "adapter":
        if model.head is None:  # a head is code of ours, and without it these would be other vectors
            vocabulary = add_to_vocabulary(processor.tokenizer, config, processor.prompts)
            table, prompts = parts.backbone[parts.embedding], parts.prompts["vectors"]
            parts.backbone[parts.embedding] = _with_prompts(table, prompts, vocabulary, dtype)
        written.append(
            write_weights(folder / BACKBONE_FOLDER, parts.backbone, dtype=dtype, shard_bytes=shard_bytes)
        )
    config.save_pretrained(folder / settings_folder(lora))
    processor.save(folder / settings_folder(lora))
    if vocabulary is not None:
        write_ecosystem_files(folder, vocabulary, config, embedder.texts)
    contract = _contract(
        embedder,
        dtype=dtype,
        origin=origin,
        lora=lora,
        base_model=base_model,
        files=fingerprints(folder, _known(folder, written)),
    )
    (folder / CARD_FILE).write_text(model_card(contract), encoding="utf-8")
    write_contract(folder, contract)
    return written


def _known(folder: Path, written: Sequence[WrittenWeights]) -> dict[str, str]:
    """The fingerprints of the files of weights, made while they were written."""
    return {
        path.relative_to(folder).as_posix(): each.files[path.name]
        for each in written
        for path in each.tensors
    }


def _contract(
    embedder: Embedder,
    *,
    dtype: torch.dtype,
    origin: Mapping[str, Any],
    lora: Lora,
    base_model: str | None,
    files: dict[str, str],
) -> Contract:
    model, processor, objective = embedder.model, embedder.processor, embedder.objective
    return Contract(
        prompts=processor.prompts,
        processor=processor.limits,
        fusion=embedder.fusion,
        nested=embedder.truncations,
        texts=embedder.texts,
        objective=name_of(objective) if objective else None,
        objective_settings=asdict(objective) if objective else {},
        pooling="last soft token of each prompt block, L2-normalised"
        + ("; then the head" if model.head is not None else ""),
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        weights="whole" if lora == "merged" else lora,
        base_model=base_model if lora != "merged" else None,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        origin=dict(origin),
        files=files,
    )


def _in_memory(model: EmbeddingModel) -> dict[str, LazyTensor]:
    return {name: of_tensor(parameter) for name, parameter in model.named_parameters()}


def _released_config(model: EmbeddingModel, dtype: torch.dtype) -> Any:
    backbone = plain_backbone(model)
    config = copy.deepcopy(backbone.config)
    config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(backbone).__name__]
    return config


def _with_prompts(
    table: LazyTensor, prompts: LazyTensor, vocabulary: VocabularyPrompts, dtype: torch.dtype
) -> LazyTensor:
    """In `dtype` from the beginning: a table in bfloat16 would round soft tokens that stay in float32."""
    rows, width = table.shape
    shape = torch.Size((max(rows, vocabulary.vocabulary_size), width))
    return LazyTensor(shape, lambda: vocabulary.put_into(table.grown(shape[0], dtype=dtype), prompts.read()))
