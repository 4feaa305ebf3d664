"""Does a release make the vectors of its checkpoint? With one of its tensors in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from agff.adapter_folder import ADAPTER_FOLDER, released_adapter
from agff.backbone import backbone_tensors, empty_backbone, empty_weights
from agff.backbone_folder import HEAD_FILE
from agff.contract import Contract, read_contract
from agff.embedding_model import EmbeddingModel
from agff.lazy_tensor import LazyTensor, of_safetensors
from agff.release import check_golden, released_embedder
from agff.release_files import BACKBONE_FOLDER, PROMPTS_FILE
from agff.release_parts import merged, plain_names
from agff.streamed_model import streamed


def check_golden_streamed(folder: Path, *, base: Path | None) -> float:
    """As `agff.release.check_golden` of the release in `folder`, whose weights are read when their module
    computes. base: the backbone's folder, of an adapter alone."""
    contract = read_contract(folder)
    dtype = getattr(torch, contract.dtype)
    source = base if contract.weights == "adapter" and base is not None else folder / BACKBONE_FOLDER
    with empty_weights():
        embedder = released_embedder(
            folder, contract, lambda: empty_backbone(source, dtype=dtype, attention="sdpa")
        )
    weights = _weights(folder, contract, embedder.model, source)
    with streamed(embedder.model, weights, dtype=dtype):
        return check_golden(embedder, folder, dtype=contract.dtype)


def _weights(folder: Path, contract: Contract, model: EmbeddingModel, source: Path) -> dict[str, LazyTensor]:
    """By the names of the model's parameters."""
    names, parameters = plain_names(model), dict(model.named_parameters())
    shells = {plain: parameters[name] for name, plain in names.items()}
    plain = backbone_tensors(source, model.backbone, shells)
    if contract.weights == "adapter":
        adapter, scale = released_adapter(folder / ADAPTER_FOLDER)
        plain |= merged(plain, adapter, scale=scale)
    found = {name: plain[own] for name, own in names.items()}
    soft_tokens = next(name for name in parameters if parameters[name] is model.prompted_embedding.vectors)
    found[soft_tokens] = of_safetensors(folder / PROMPTS_FILE)["vectors"]
    if contract.objective is not None:
        found |= {f"head.{name}": lazy for name, lazy in of_safetensors(folder / HEAD_FILE).items()}
    return found
