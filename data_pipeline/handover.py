"""Handing batches from a loader's worker to its rank through memory that both share from the beginning.

torch hands each tensor over in a new piece of shared memory: fresh pages, a file descriptor, room in
/dev/shm. Here each worker has a few slots that are used again and again, so the pages are there already.
(Ours.)
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from agff.errors import DataError

_SLOT_BYTES = 2**36
"""Of address space; memory is used as far as the largest batch needs it."""
_SMALLEST_SLOT_BYTES = 2**28
_ALIGNMENT = 64
_NO_RESERVE = 0x4000
"""MAP_NORESERVE of Linux; the mmap module has no name for it before Python 3.13."""


class HasTensors(Protocol):
    """What can be handed over: `agff.batch.Batch` and its like."""

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same with `move(tensor)` for each tensor, always in the same order."""


AnyBatch = TypeVar("AnyBatch", bound=HasTensors)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Stands for a tensor."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class HandedBatch(Generic[AnyBatch]):
    """A batch whose tensors lie in a slot; what travels between the processes."""

    batch: AnyBatch
    """With a _Place for each tensor."""
    slots: int
    worker: int
    slot: int

    def open(self) -> AnyBatch:
        """The batch, its tensors in the slot. Only in the process that made the slots."""
        memory = _slots_of_this_process[self.slots].memory[self.worker][self.slot]

        def view(place: Any) -> Tensor:
            return _view(memory, place)

        return self.batch.map_tensors(view)

    def pin_memory(self) -> AnyBatch:
        """A copy in page-locked memory; called by torch's DataLoader."""
        return self.open().map_tensors(Tensor.pin_memory)


class Slots:
    """Shared memory for `num_workers` workers, made before they are forked.

    A worker's batch t lies in slot t modulo `slots_per_worker`, so it is valid until that many batches later.
    A loader that lets a worker be `prefetch` batches ahead needs prefetch + 1 slots: the last is for the
    batch in use.
    """

    def __init__(self, num_workers: int, *, slots_per_worker: int) -> None:
        self.memory = _reserve(num_workers, slots_per_worker)
        self._num_handed = 0
        _slots_of_this_process[id(self)] = self

    def hand(self, batch: AnyBatch, worker: int) -> HandedBatch[AnyBatch]:
        """Copy the tensors into the worker's next slot. Called in the worker."""
        slot = self._num_handed % len(self.memory[worker])
        self._num_handed += 1
        end = 0

        def put(tensor: Tensor) -> Any:
            nonlocal end
            place = _Place(offset=end, shape=tuple(tensor.shape), dtype=tensor.dtype)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            if end > len(self.memory[worker][slot]):
                raise DataError(
                    f"a batch has more than {len(self.memory[worker][slot]):,} bytes, the address space of "
                    "one slot; raise the limit on it (ulimit -v), lower processor.max_pixels, or use more "
                    "ranks"
                )
            _view(self.memory[worker][slot], place).copy_(tensor)
            return place

        return HandedBatch(batch=batch.map_tensors(put), slots=id(self), worker=worker, slot=slot)


_slots_of_this_process: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


def _reserve(num_workers: int, slots_per_worker: int) -> list[list[mmap.mmap]]:
    """As large as the machine's limits allow."""
    flags, size = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE, _SLOT_BYTES
    while True:
        try:
            return [
                [mmap.mmap(-1, size, flags=flags) for _ in range(slots_per_worker)]
                for _ in range(num_workers)
            ]
        except OSError as error:
            if size <= _SMALLEST_SLOT_BYTES:
                raise DataError(
                    f"{num_workers} loader workers need {num_workers * slots_per_worker * size:,} bytes of "
                    f"address space: {error}; raise the limit on it (ulimit -v), or lower data.num_workers"
                ) from None
            size //= 2


def _view(memory: mmap.mmap, place: _Place) -> Tensor:
    count = math.prod(place.shape)
    if count == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset).view(place.shape)
