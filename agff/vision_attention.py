"""Attention of a vision tower inside segments of packed patches: no loop over images, nothing read from the
device.

The Qwen towers lay the patches of all images of a chunk one behind the other. A patch attends to its own
segment, which is its image or, in most layers of Qwen2.5-VL, its window. transformers' towers call a flash
kernel once for all segments, any other attention once for each, with the lengths read from the device in
each layer. This one is registered under a name with "flash" in it, which is how they decide, so that it gets
all segments at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

IMPLEMENTATION = "agff_flash_segments"
"""Name for a tower's `config._attn_implementation`."""


class Segments:
    """How a packed sequence is divided. The lengths are Python integers: to group them reads no device."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self._order_on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(number of segments, their length), a group for each length, short ones first."""
        return tuple((num, length) for length, num in sorted(Counter(self.lengths).items()))

    def order_on(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(P,) indices that bring the patches of a group together, and those that bring them back; None
        where they are together."""
        if len(self.groups) == 1:
            return None
        if device not in self._order_on:
            start_S = itertools.accumulate(self.lengths, initial=0)
            by_length = sorted(zip(self.lengths, start_S, strict=False))
            order_P = np.concatenate([np.arange(start, start + length) for length, start in by_length])
            pair = torch.from_numpy(order_P), torch.from_numpy(order_P.argsort())
            self._order_on[device] = pair[0].to(device), pair[1].to(device)
        return self._order_on[device]


def register() -> None:
    """Make IMPLEMENTATION known to transformers. Twice does no harm."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend_within_segments)


def attend_within_segments(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    segments: Sequence[Segments] = (),
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, P, heads, D) outputs of full attention inside each segment; transformers' attention interface.

    query, key, value: (1, heads, P, D). cu_seq_lens_q: (S + 1,) int32, where the S segments begin and end.
    segments: ways of division, of which the one with S lengths is meant (two with the same number of segments
    are the same: a window is never larger than its image). Without them the lengths are read from the device.

    On a GPU with a kernel for segments of any length: one call. Else one call for each length that occurs.
    """
    assert attention_mask is None
    assert dropout == 0
    query_PHD, key_PHD, value_PHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        output_PHD = varlen_attn(
            query_PHD,
            key_PHD,
            value_PHD,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
        )
        assert isinstance(output_PHD, Tensor)
        return output_PHD[None], None
    num_segments = cu_seq_lens_q.shape[0] - 1
    division = next((s for s in segments if len(s.lengths) == num_segments), None)
    division = division or Segments(cu_seq_lens_q.diff().tolist())
    return attend_by_length(query_PHD, key_PHD, value_PHD, division, scaling=scaling)[None], None


def attend_by_length(
    query_PHD: Tensor, key_PHD: Tensor, value_PHD: Tensor, segments: Segments, *, scaling: float
) -> Tensor:
    """(P, heads, D) outputs of full attention inside each segment; segments of one length are one call."""
    packed = [query_PHD, key_PHD, value_PHD]
    order = segments.order_on(query_PHD.device)
    if order is not None:
        packed = [tensor.index_select(0, order[0]) for tensor in packed]
    sizes = [num * length for num, length in segments.groups]
    outputs = []
    for (num, length), *parts in zip(
        segments.groups, *(tensor.split(sizes) for tensor in packed), strict=True
    ):
        query, key, value = (part.unflatten(0, (num, length)).transpose(1, 2) for part in parts)
        output = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output_PHD = torch.cat(outputs)
    return output_PHD if order is None else output_PHD.index_select(0, order[1])


@cache
def _varlen_takes_scale() -> bool:
    """The towers give their scale, which is not always that of the head size; the first versions of torch's
    varlen_attn take none."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention import varlen

    return "scale" in signature(varlen.varlen_attn).parameters


def has_varlen_kernel(query: Tensor) -> bool:
    """Whether torch has a kernel for segments of any length here: a `varlen_attn` with `scale`, CUDA, Ampere
    or later, 16 bit, heads of a multiple of 8 up to 256."""
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and _varlen_takes_scale()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_size % 8 == 0
        and head_size <= 256
    )
