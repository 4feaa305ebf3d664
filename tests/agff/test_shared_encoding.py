"""Items that all ranks encode together, whatever their number."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from agff.batch import Encoded, ModelInputs
from agff.grad_cache import unchanged_random_states
from agff.shared_encoding import encode_shared, own_chunks
from tests.ranks import run_ranks

CHUNKS = [[4, 0, 2], [1, 3], [6, 5], [7], [9, 8]]
VECTORS = torch.arange(60.0).reshape(10, 2, 3)
FILLER = {"items": torch.tensor([0])}


class Encoder:
    """Vectors by number, and how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: ModelInputs) -> Encoded:
        assert not torch.is_grad_enabled()
        self.calls += 1
        return {"embedding": VECTORS[inputs["items"]]}


def encoded(broken: int | None = None, stops_at: int | None = None) -> tuple[Tensor | None, int]:
    """(what this rank gets, calls of its model). broken: the chunk that cannot be made; stops_at: the chunk
    before which the last rank is asked to stop."""
    encode, asked = Encoder(), iter(range(99))
    is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    inputs = (
        None if chunk == (broken is not None and CHUNKS[broken]) else {"items": torch.tensor(chunk)}
        for chunk in own_chunks(CHUNKS)
    )
    found = encode_shared(
        encode,
        CHUNKS,
        inputs,
        filler=FILLER,
        num_items=10,
        device=torch.device("cpu"),
        should_stop=lambda: is_last and next(asked) == stops_at,
    )
    return found, encode.calls


def on_ranks() -> list[tuple[Tensor | None, int]]:
    return [encoded(), encoded(broken=2), encoded(stops_at=1)]


def test_every_rank_has_all_vectors_after_as_many_calls() -> None:
    """Of five chunks the second rank encodes two and the filler."""
    for whole, broken, stopped in run_ranks(on_ranks, world_size=2):
        assert torch.equal(whole[0], VECTORS)
        assert whole[1] == 3
        assert broken == (None, 1), "chunk 2 is the second of rank 0"
        assert stopped == (None, 1)


def test_one_process_does_the_same_without_ranks() -> None:
    whole, broken, stopped = on_ranks()
    assert whole[0] is not None
    assert torch.equal(whole[0], VECTORS)
    assert (whole[1], broken, stopped) == (5, (None, 2), (None, 1))


def test_all_random_states_are_those_of_before() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert draw() == expected[0]
    with unchanged_random_states():
        torch.manual_seed(5)
        assert draw() != expected[1]
    assert draw() == expected[1]
