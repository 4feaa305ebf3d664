"""What of a trained model becomes which file of a release: the backbone with its adapters merged under the
names that transformers gives its weights, the adapters under peft's, soft tokens, head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError
from agff.lazy_tensor import LazyTensor

LORA = re.compile(r"\.lora_([AB])\.default\.weight$")
PEFT_PREFIX = "base_model.model."
"""Of the names of a model's parts in a peft model."""


@dataclass(frozen=True, kw_only=True)
class ReleaseParts:
    """The tensors of a release, each by its name in its file."""

    backbone: dict[str, LazyTensor]
    prompts: dict[str, LazyTensor]
    head: dict[str, LazyTensor]
    adapter: dict[str, LazyTensor]
    """Empty after full tuning."""
    embedding: str
    """Name in `backbone` of the vocabulary's embedding table."""


def release_parts(model: EmbeddingModel, weights: Mapping[str, LazyTensor]) -> ReleaseParts:
    """weights: by the names of the model's parameters, all of them; the model itself may be without any.

    Raises CheckpointError for adapters that are all zeros and for those that are of no layer.
    """
    table = _table(model)
    plain = {plain: weights[name] for name, plain in plain_names(model).items()}
    adapter = {name.removeprefix("backbone."): weights[name] for name in weights if LORA.search(name)}
    if adapter:
        plain |= merged(plain, adapter, scale=lora_scale(model))
    in_files = _names_in_files(model, plain)
    return ReleaseParts(
        backbone={in_files[name]: lazy for name, lazy in plain.items()},
        prompts={"vectors": weights[f"backbone.{table}.vectors"]},
        head={name.removeprefix("head."): lazy for name, lazy in weights.items() if name.startswith("head.")},
        adapter={name.replace(".default.weight", ".weight"): lazy for name, lazy in adapter.items()},
        embedding=in_files[f"{table.removeprefix(PEFT_PREFIX)}.weight"],
    )


def plain_names(model: EmbeddingModel) -> dict[str, str]:
    """Of each parameter that is the backbone's own, no adapter and no soft token: name in the model -> name
    in transformers' model."""
    table = _table(model)
    inner = {
        name: name.removeprefix("backbone.").replace(f"{table}.base.", f"{table}.")
        for name, _ in model.named_parameters()
        if name.startswith("backbone.") and name != f"backbone.{table}.vectors" and not LORA.search(name)
    }
    return {name: own.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for name, own in inner.items()}


def _table(model: EmbeddingModel) -> str:
    """Name of the module in the backbone that embeds tokens and prompts."""
    embedding = model.prompted_embedding
    return next(name for name, module in model.backbone.named_modules() if module is embedding)


def lora_config(model: EmbeddingModel) -> Any:
    """peft's configuration of the model's adapters; None where it has none."""
    return getattr(model.backbone, "peft_config", {}).get("default")


def plain_backbone(model: EmbeddingModel) -> Any:
    """transformers' model inside, without what peft puts around it."""
    return model.backbone.get_base_model() if lora_config(model) else model.backbone


def lora_scale(model: EmbeddingModel) -> float:
    """What B A is multiplied with."""
    config = lora_config(model)
    return config.lora_alpha / config.r


def merged(
    plain: Mapping[str, LazyTensor], adapter: Mapping[str, LazyTensor], *, scale: float
) -> dict[str, LazyTensor]:
    """W + scale B A of each adapted layer, by the name of W.

    Raises CheckpointError for adapters that are all zeros and for those that are of no layer."""
    layers = {LORA.sub("", name) for name in adapter}
    pairs = {layer: [adapter.get(f"{layer}.lora_{side}.default.weight") for side in "AB"] for layer in layers}
    found, unapplied = {}, []
    for layer, (a, b) in sorted(pairs.items()):
        name = f"{layer.removeprefix(PEFT_PREFIX)}.weight"
        if a is None or b is None or name not in plain:
            unapplied.append(f"{layer} ({'one of its halves' if name in plain else 'its layer'} is missing)")
        else:
            found[name] = _merge(plain[name], a, b, scale)
    if unapplied:
        more = f" and {len(unapplied) - 5} more" if len(unapplied) > 5 else ""
        raise CheckpointError(
            f"{len(unapplied)} of {len(pairs)} adapters cannot be applied: {', '.join(unapplied[:5])}{more}; "
            "the checkpoint is of another backbone or was not saved whole"
        )
    if all(not b.read().any() for _, b in pairs.values() if b is not None):
        raise CheckpointError(
            f"all {len(pairs)} adapters are zero: the model is the backbone as it was; nothing was trained, "
            "or the checkpoint was not saved whole; convert a later step (--step)"
        )
    return found


def _merge(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    def read() -> Tensor:
        update = b.read().float() @ a.read().float()
        return update.mul_(scale).add_(weight.read())

    return LazyTensor(weight.shape, read)


def _names_in_files(model: EmbeddingModel, plain: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The names of the backbone's parameters as transformers writes them: some families have had others since
    they were published, which every version reads."""
    from transformers.core_model_loading import revert_weight_conversion

    shells = {name: torch.empty(lazy.shape, device="meta") for name, lazy in plain.items()}
    written = revert_weight_conversion(plain_backbone(model), dict(shells))
    names = {id(shell): name for name, shell in written.items()}
    if lost := [name for name, shell in shells.items() if id(shell) not in names]:
        raise CheckpointError(
            f"transformers writes {', '.join(lost[:3])} in another shape; such a backbone cannot be released"
        )
    return {name: names[id(shell)] for name, shell in shells.items()}
