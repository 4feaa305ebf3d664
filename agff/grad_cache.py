"""The two-pass step (GradCache, arXiv 2101.06983): any batch in the memory of one chunk, exact gradient.

Pass 1 encodes every chunk without a graph. The loss gives the gradient at the embeddings. Pass 2 encodes
again, chunk by chunk, and carries that gradient into the parameters. These functions know no engine: `encode`
and `backward` are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agff.batch import ModelInputs

RandomState = tuple[Tensor, Tensor | None]


def encode_without_graph(
    encode: Callable[[ModelInputs], Tensor], chunks: Sequence[ModelInputs]
) -> tuple[list[Tensor], list[RandomState]]:
    """Embeddings of each chunk, and the random state before each one, so that pass 2 draws the same dropout.

    Under ZeRO-3 a collective: every rank must call it with the same number of chunks.
    """
    embeddings, random_states = [], []
    for chunk in chunks:
        random_states.append(random_state())
        with torch.no_grad():
            embeddings.append(encode(chunk))
    return embeddings, random_states


def backward_through_chunks(
    encode: Callable[[ModelInputs], Tensor],
    chunks: Sequence[ModelInputs],
    gradients: Sequence[Tensor],
    random_states: Sequence[RandomState],
    backward: Callable[[Tensor, bool], None],
) -> None:
    """Encode each chunk again and call `backward(surrogate, is_last)`.

    surrogate = sum(embedding * gradient): a scalar whose parameter gradient is the chunk's share of the true
    gradient. Under ZeRO a collective: every rank must call it with the same number of chunks.
    """
    for index, (chunk, gradient, state) in enumerate(zip(chunks, gradients, random_states, strict=True)):
        set_random_state(state)
        backward((encode(chunk) * gradient).sum(), index == len(chunks) - 1)


def random_state() -> RandomState:
    """State of torch's generators: CPU, and this process's current GPU if it uses one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: RandomState) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
