"""The two-pass step (GradCache, arXiv 2101.06983): any batch in the memory of one chunk, exact gradient.

Pass 1 encodes every chunk, several at once, without a graph; but the first one, which has the longest rows,
comes last and keeps its graph. The loss gives the gradient at each named output. Then that chunk goes back,
and pass 2 encodes the others again, one by one, and carries their gradients into the parameters. One chunk is
the plain step. These functions know no engine: `encode` and `backward` are given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from agff.batch import Batch, Encoded, ModelInputs

RandomState = tuple[Tensor, Tensor | None]
Gradients = Mapping[str, Tensor]
"""Of a loss, at each named output of one chunk."""


def encode_without_graph(
    encode: Callable[[Sequence[ModelInputs]], list[Encoded]],
    chunks: Sequence[ModelInputs],
    groups: Sequence[slice],
) -> tuple[list[Encoded], list[RandomState]]:
    """What the model says of each chunk, and the random state before each one, so that pass 2 draws the same
    dropout.

    groups: of the chunks that are encoded at once; more than one only where the model draws no random
    numbers. Under ZeRO-3 a collective: every rank must call it with the same number of groups.
    """
    encoded: list[Encoded] = []
    random_states: list[RandomState] = []
    for part in groups:
        group, before = chunks[part], random_state()
        with torch.no_grad():
            encoded += encode(group)
        if len(group) > 1 and not _are_equal(before, random_state()):
            raise RuntimeError("a model that draws random numbers encoded several chunks at once in pass 1")
        random_states += [before] * len(group)
    return encoded, random_states


def sides_as_leaves(batch: Batch, encoded: Sequence[Encoded]) -> tuple[Encoded, Encoded, Encoded]:
    """What the model says of each chunk -> of queries, targets and explicit negatives, cut off from their
    graph, at which gradients are taken."""
    with torch.no_grad():
        rows = {name: torch.cat([chunk[name] for chunk in encoded]) for name in encoded[0]}
        sides = batch.split(rows)
    for side in sides:
        for tensor in side.values():
            tensor.requires_grad_()
    return sides


def gradients_at(loss: Tensor, sides: Sequence[Encoded]) -> list[Gradients]:
    """Gradient of the loss at each named output of each side; zeros where the loss does not use one, so that
    all ranks go back through the same modules."""
    flat = [tensor for side in sides for tensor in side.values()]
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
    return [{name: next(found) for name in side} for side in sides]


def gradients_of_chunks(of_sides: list[Gradients], batch: Batch, sizes: Sequence[int]) -> list[Gradients]:
    """The same by chunk, of that many rows each; uses up the list."""
    rows = {
        name: batch.add_up([side[name] for side in of_sides], num_rows=sum(sizes)).split(list(sizes))
        for name in of_sides[0]
    }
    of_sides.clear()
    return [{name: parts[index] for name, parts in rows.items()} for index in range(len(sizes))]


def surrogate(encoded: Encoded, gradients: Gradients) -> Tensor:
    """A scalar whose parameter gradient is the chunk's share of the true gradient."""
    return torch.stack([(encoded[name] * gradient).sum() for name, gradient in gradients.items()]).sum()


def backward_through_chunks(
    encode: Callable[[ModelInputs], Encoded],
    chunks: Sequence[ModelInputs],
    gradients: Sequence[Gradients],
    random_states: Sequence[RandomState],
    backward: Callable[[Tensor, bool], None],
) -> None:
    """Encode each chunk again and call `backward(surrogate, is_last)`. The random state after it is that of
    before.

    Under ZeRO a collective: every rank must call it with the same number of chunks.
    """
    before = random_state()
    for index, (chunk, gradient, state) in enumerate(zip(chunks, gradients, random_states, strict=True)):
        set_random_state(state)
        backward(surrogate(encode(chunk), gradient), index == len(chunks) - 1)
    set_random_state(before)


def _are_equal(one: RandomState, other: RandomState) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


def random_state() -> RandomState:
    """State of torch's generators: CPU, and this process's current GPU if it uses one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: RandomState) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Whatever is drawn in here, torch's, NumPy's and Python's generators are afterwards as they were
    before."""
    of_torch, of_python, of_numpy = random_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        set_random_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
