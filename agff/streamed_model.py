"""A model that holds no weights: each module has its own while it computes, and only then.

So the vectors of a model that memory would not hold are made with its largest tensor in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from agff.embedding_model import EmbeddingModel
from agff.lazy_tensor import LazyTensor

RESIDENT_ELEMENTS = 2**16
"""Tensors of at most this many elements are there all the time, as biases and norms."""


@contextmanager
def streamed(
    model: EmbeddingModel, weights: Mapping[str, LazyTensor], *, dtype: torch.dtype
) -> Iterator[None]:
    """In here a model whose parameters are on the meta device computes as if it had `weights`, rounded to
    `dtype`; afterwards it has none again.

    weights: by the names of the parameters, all of them. The soft tokens are there all the time: they say
    where the model is.
    """
    removers: list[Any] = []
    empty: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for prefix, module in model.named_modules():
            own = {name: f"{prefix}.{name}" if prefix else name for name in module._parameters}
            empty += [(module, name, module._parameters[name]) for name in own]
            large = {}
            for name, whole_name in own.items():
                if module._parameters[name] is None:
                    continue
                is_small = weights[whole_name].shape.numel() <= RESIDENT_ELEMENTS
                if is_small or module is model.prompted_embedding:
                    module._parameters[name] = _parameter(weights[whole_name], dtype)
                else:
                    large[name] = weights[whole_name]
            if large:
                removers += _hooks(module, large, dtype)
        yield
    finally:
        for remover in removers:
            remover.remove()
        for module, name, parameter in empty:
            module._parameters[name] = parameter


def _parameter(lazy: LazyTensor, dtype: torch.dtype) -> nn.Parameter:
    with torch.inference_mode(False):
        return nn.Parameter(lazy.read().to(dtype), requires_grad=False)


def _hooks(module: nn.Module, large: Mapping[str, LazyTensor], dtype: torch.dtype) -> list[Any]:
    empty = {name: module._parameters[name] for name in large}

    def fill(*_: Any) -> None:
        for name, lazy in large.items():
            module._parameters[name] = _parameter(lazy, dtype)

    def release(*_: Any) -> None:
        module._parameters.update(empty)

    return [
        module.register_forward_pre_hook(fill),
        module.register_forward_hook(release, always_call=True),
    ]
