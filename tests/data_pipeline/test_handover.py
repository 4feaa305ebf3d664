from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agff.batch import Batch
from agff.errors import DataError
from data_pipeline import handover
from data_pipeline.handover import Slots


def batch_of(seed: int, num_chunks: int, num_negatives: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def chunk(rows: int) -> dict[str, Any]:
        return {
            "input_ids": torch.randint(0, 100, (rows, 5), generator=generator),
            "image_lengths": torch.ones(rows, dtype=torch.int32),
            "pixel_values": torch.randn(rows * 4, 6, generator=generator),
            "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        }

    return Batch(
        chunks=tuple(chunk(2 + index) for index in range(num_chunks)),
        row_of_item_R=torch.arange(4 + num_negatives),
        query_ids_B=torch.tensor([1, 2]),
        target_ids_B=torch.tensor([3, 4]),
        negative_ids_N=torch.arange(num_negatives),
        addresses=("a", "b"),
        filler=chunk(1),
        pair_data={"score": torch.rand(2, generator=generator)},
    )


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.map_tensors(lambda tensor: found.append(tensor) or tensor)
    return found


@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_batch_arrives_as_it_was_and_stays_until_its_slot_comes_again(
    shapes: list[tuple[int, int]],
) -> None:
    slots = Slots(1, slots_per_worker=3)
    sent = [batch_of(seed, *shape) for seed, shape in enumerate(shapes)]
    handed = [slots.hand(batch, 0) for batch in sent[:3]]
    for t, batch in enumerate(sent):
        if t >= 3:
            handed.append(slots.hand(batch, 0))
        opened = handed[t].open()
        assert len(tensors(opened)) == len(tensors(batch))
        for found, expected in zip(tensors(opened), tensors(batch), strict=True):
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
        assert replace(opened, chunks=(), filler={}).addresses == batch.addresses


def test_tensors_outlive_the_slots_object() -> None:
    slots = Slots(1, slots_per_worker=1)
    opened = slots.hand(batch_of(0, 2, 1), 0).open()
    expected = [tensor.clone() for tensor in tensors(opened)]
    del slots
    gc.collect()
    assert all(torch.equal(found, kept) for found, kept in zip(tensors(opened), expected, strict=True))


def test_a_batch_of_slots_that_are_gone_is_no_silent_garbage() -> None:
    slots = Slots(1, slots_per_worker=1)
    handed = slots.hand(batch_of(0, 1, 0), 0)
    del slots
    gc.collect()
    with pytest.raises(KeyError):
        handed.open()


LIMITED = """
import resource, sys
from agff.errors import DataError
import data_pipeline.handover as handover
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), resource.RLIM_INFINITY))
try:
    slots = handover.Slots(1, slots_per_worker=3)
    print(len(slots.memory[0][0]))
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("room", "expected"),
    [(8 * 2**30, str(2 * 2**30)), (2**28, "1 loader workers need 805,306,368 bytes of address space")],
)
def test_limits_on_address_space_make_smaller_slots_or_a_clear_error(room: int, expected: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room)], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(expected)


def test_a_batch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_SLOT_BYTES", 4096)
    with pytest.raises(
        DataError, match=r"a batch has more than 4,096 bytes, the address space of one slot; raise the limit"
    ):
        handover.Slots(1, slots_per_worker=1).hand(batch_of(0, 12, 3), 0)
