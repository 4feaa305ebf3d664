"""Floating-point operations of one layer by formula: matrix products and attention, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How a kernel computes attention."""

    skips_future: bool
    """Causal attention costs half the square, not all of it."""
    backward_products: int
    """4 from kept probabilities; 5 where the scores are computed again."""

    def pairs(self, length: int) -> int:
        """Pairs of query and key that it computes in causal attention over that many tokens."""
        return length * (length + 1) // 2 if self.skips_future else length**2


NEEDED_ATTENTION = Attention(skips_future=True, backward_products=4)
"""What the mathematics needs."""
ATTENTIONS = {
    "eager": Attention(skips_future=False, backward_products=4),
    "sdpa": Attention(skips_future=True, backward_products=5),
    "flash_attention_2": Attention(skips_future=True, backward_products=5),
}
"""By `backbone.attention`. torch's counter counts the full square for every kernel, and nothing at all for
the fused one on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of a part of the model for some rows."""

    forward: int = 0
    backward: int = 0
    """Without what checkpointing computes again."""
    recomputed: int = 0
    """What the backward of checkpointed blocks computes again."""

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            recomputed=self.recomputed + other.recomputed,
        )

    def __mul__(self, times: int) -> Flops:
        return Flops(
            forward=self.forward * times,
            backward=self.backward * times,
            recomputed=self.recomputed * times,
        )


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A matrix that rows are multiplied with, and its adapter."""

    inputs: int
    outputs: int
    trains: bool
    passes_gradient: bool = True
    """Whether what lies before it trains."""
    lora_rank: int = 0

    def flops(self, rows: int) -> Flops:
        """Backward: as much for the gradient of the input, as much for that of a matrix that trains."""
        own = 2 * rows * self.inputs * self.outputs
        adapter = 2 * rows * self.lora_rank * (self.inputs + self.outputs)
        return Flops(
            forward=own + adapter,
            backward=(self.trains + self.passes_gradient) * own + (1 + self.passes_gradient) * adapter,
        )

    def last_product(self, rows: int) -> int:
        """Of the forward pass: the adapter's second matrix, or the matrix itself."""
        return 2 * rows * (self.lora_rank or self.inputs) * self.outputs


@dataclass(frozen=True, kw_only=True)
class Block:
    """A transformer layer: its linear layers in order and attention between them."""

    linears: tuple[Linear, ...]
    attention_width: int
    """Heads x head dimension of the queries; grouped keys and values are used once for each query head."""
    attention: Attention
    has_backward: bool = True
    checkpointed: bool = False

    def flops(self, rows: int, pairs: int) -> Flops:
        """pairs: of query and key, over all sequences.

        Non-reentrant checkpointing stops before the last product: nothing in the backward needs its result.
        """
        product = 2 * pairs * self.attention_width
        flops = sum((linear.flops(rows) for linear in self.linears), Flops())
        flops += Flops(forward=2 * product, backward=self.attention.backward_products * product)
        if not self.has_backward:
            return Flops(forward=flops.forward)
        if not self.checkpointed:
            return flops
        return replace(flops, recomputed=flops.forward - self.linears[-1].last_product(rows))
