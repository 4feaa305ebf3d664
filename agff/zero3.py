"""ZeRO-3 as a model needs it: what is gathered at once, sizes from the model, DeepSpeed's own linear in its
place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers import PreTrainedModel

from agff.errors import TrainingError
from agff.families import FAMILIES

RESIDENT_ELEMENTS = 16 * 2**20
"""Parameters that each rank keeps whole, together: 32 MiB in bf16."""

SMALLEST_BUCKET = 50_000_000
"""Elements. Below it collectives cost more than they carry; one layer of a 2B model has 47 M."""


def fill_in(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The DeepSpeed configuration with what it leaves out under ZeRO-3, from the sizes of the model.

    What is written wins, under DeepSpeed's short names too. The buckets hold the largest layer: it is then
    gathered while the layer before it computes, and its gradients are reduced at once. Parameters are kept
    whole from the smallest on, up to RESIDENT_ELEMENTS. DeepSpeed's own linear keeps no gathered weight for
    the backward pass, for a Python function in each layer: where layers are recomputed, the plain one keeps
    those of a single layer, and where nothing is partitioned there is no gathered weight.
    """
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        return dict(config)
    layer = max((sum(map(_num_elements, part.parameters())) for part in whole_modules(model)), default=0)
    bucket = max(SMALLEST_BUCKET, layer)
    is_recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    written = {**zero, **{f"stage3_{name}": value for name, value in zero.items()}}
    threshold = written.get("stage3_param_persistence_threshold", _largest_resident(model))
    is_partitioned = any(_num_elements(parameter) > threshold for parameter in model.parameters())
    sizes = {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": threshold,
        "memory_efficient_linear": is_partitioned and not is_recomputed,
    }
    absent = {name: size for name, size in sizes.items() if name not in written}
    return {**config, "zero_optimization": {**zero, **absent}}


def whole_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of the backbone inside that can be gathered whole (`Family.gathered_whole`)."""
    for module in model.modules():
        family = FAMILIES.get(module.config.model_type) if isinstance(module, PreTrainedModel) else None
        if family is None:
            continue
        inner = dict(module.named_modules())
        parts = [inner[name] for name in family.gathered_whole if name in inner]
        frozen = [inner[name] for name in family.frozen_gathered_whole if name in inner]
        parts += [part for part in frozen if not any(p.requires_grad for p in part.parameters())]
        return [each for part in parts for each in (part if isinstance(part, nn.ModuleList) else [part])]
    return []


def gather_whole(config: Mapping[str, Any], model: nn.Module) -> None:
    """Make those modules ZeRO-3's leaves: one fetch and one pair of hooks each, not one for every linear in
    them.

    Before the engine is built. DeepSpeed 0.19 reduces a leaf's gradients right only when each backward goes
    through one forward that has a graph, which is what a step does (agff/step.py). A configuration that names
    leaves of its own keeps them.
    """
    zero = config["zero_optimization"]
    if zero["stage"] == 3 and "leaf_module" not in zero:
        for module in whole_modules(model):
            set_z3_leaf_module(module, True)


def leaving_linear(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as DeepSpeed gets it, to load a model with and to build its engine.

    It would replace torch.nn.functional.linear for the whole process and leave it so: whatever is encoded
    there later would run DeepSpeed's too. `efficient_linear` puts it there for as long as it is needed.
    """
    return {**config, "zero_optimization": {**config["zero_optimization"], "memory_efficient_linear": False}}


@contextmanager
def efficient_linear(config: Mapping[str, Any]) -> Iterator[None]:
    """torch.nn.functional.linear is DeepSpeed's in here, where the (filled in) configuration asks for it."""
    zero, linear = config["zero_optimization"], nn.functional.linear
    if zero["stage"] == 3 and zero["memory_efficient_linear"]:
        nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        nn.functional.linear = linear


@dataclass(kw_only=True)
class Gathers:
    """All-gathers of parameters by ZeRO-3 on this rank. On a single rank there are none."""

    count: int = 0
    num_bytes: int = 0
    """Of the whole parameters, as they arrive."""
    is_counted: bool = True
    """False where this DeepSpeed gathers in another way, which is not counted."""


def check_all_reduced(model: nn.Module) -> None:
    """After the last backward of a step no gradient may be left on a parameter: the optimizer would not get
    it. Raises TrainingError.

    It is left where a module is gathered whole although its input has no gradient, or its output reaches the
    loss past its own hooks.
    """
    left = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    if left:
        # all ranks raise it: they have the same modules, and an image, if a blank one, in every chunk; and
        # reducing is a collective, in which a rank with other gradients would have hung before
        raise TrainingError(
            f"ZeRO-3 left the gradients of {len(left)} parameters out of the update, {', '.join(left[:3])}; "
            'they are in a module that must not be gathered whole: "leaf_module": {"classes": []} in the '
            "DeepSpeed configuration gathers none"
        ).shared()


@contextmanager
def counted_gathers(config: Mapping[str, Any], found: Gathers) -> Iterator[None]:
    """Add what ZeRO-3 gathers in here, as long as DeepSpeed gathers through a function of this private
    name."""
    gather = getattr(partition_parameters, "_dist_allgather_fn", None)
    is_needed = config["zero_optimization"]["stage"] == 3
    found.is_counted = gather is not None or not is_needed
    if gather is None or not is_needed:
        yield
        return

    def counted(source: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        found.count += 1
        found.num_bytes += whole.nbytes
        return gather(source, whole, group)

    partition_parameters._dist_allgather_fn = counted
    try:
        yield
    finally:
        partition_parameters._dist_allgather_fn = gather


def _num_elements(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _largest_resident(model: nn.Module) -> int:
    """The largest size such that all parameters of at most that size have RESIDENT_ELEMENTS together."""
    sizes = sorted(map(_num_elements, model.parameters()))
    total, largest = 0, 0
    for size in sorted(set(sizes)):
        total += size * sizes.count(size)
        if total > RESIDENT_ELEMENTS:
            break
        largest = size
    return largest
