"""Floating-point operations of the objectives' heads by formula, where they cost more than 1 % of a step:
VEIN's decoder, MM-GEM's pooling, projections and language-model head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from agff.layer_flops import Flops, Linear
from agff.objectives.mm_gem import MmGem
from agff.objectives.objective import Objective
from agff.objectives.vein import Vein


class HeadRow(Protocol):
    """What a head's cost depends on."""

    @property
    def length(self) -> int:
        """Tokens."""

    @property
    def caption(self) -> int:
        """Tokens to say."""

    @property
    def cells(self) -> int:
        """Of the prefix; 0 without an image."""


def head_flops(objective: Objective, model_config: Any, rows: Sequence[HeadRow]) -> Flops:
    """Of one chunk. Heads without a matrix product cost nothing."""
    text = model_config.get_text_config()
    if isinstance(objective, Vein):
        length = max(row.length for row in rows)
        return decoder_flops(
            text.hidden_size,
            num_rows=len(rows) * objective.layers,
            num_inputs=1 + max(1, int(objective.mask_ratio * length)),
            num_memory=length,
        )
    if isinstance(objective, MmGem):
        return mm_gem_flops(
            text.hidden_size,
            text.vocab_size,
            num_rows=len(rows),
            num_cells=objective.grid**2 * sum(bool(row.cells) for row in rows),
            num_prefix=sum(row.cells for row in rows),
            num_caption=max(1, sum(row.caption for row in rows)),
        )
    return Flops()


def decoder_flops(hidden: int, *, num_rows: int, num_inputs: int, num_memory: int) -> Flops:
    """One nn.TransformerDecoderLayer with a feed-forward of twice the width, whose memory takes no gradient.
    10 matrices (hidden, hidden) read an input, 2 a token of the memory; attention as 4 products backward."""
    inputs = Linear(inputs=hidden, outputs=10 * hidden, trains=True).flops(num_rows * num_inputs)
    memory = Linear(inputs=hidden, outputs=2 * hidden, trains=True, passes_gradient=False)
    product = 2 * num_rows * num_inputs * (num_inputs + num_memory) * hidden
    return inputs + memory.flops(num_rows * num_memory) + Flops(forward=2 * product, backward=4 * product)


def mm_gem_flops(
    hidden: int, vocabulary: int, *, num_rows: int, num_cells: int, num_prefix: int, num_caption: int
) -> Flops:
    """Two matrices a cell of an image, two a cell of a prefix, h1 and h3 of every row, and the language
    model's head of every caption token, which the backward pass computes again. The means over a map's cells
    are left out: 2 % of this for a map of 16 x 16."""
    square = Linear(inputs=hidden, outputs=hidden, trains=True).flops(2 * (num_rows + num_cells + num_prefix))
    words = Linear(inputs=hidden, outputs=vocabulary, trains=True).flops(num_caption)
    return square + words + Flops(recomputed=words.forward)
