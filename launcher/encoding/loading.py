"""Batches of items in the order in which they are asked for, loaded and processed by worker processes while
the model computes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from agff.batch import Item, ModelInputs, ProcessItems
from agff.errors import DataError
from data_pipeline.handover import HandedBatch, Slots

PREFETCH = 2
"""Batches that each worker prepares ahead."""
MOST_WORKERS = 8
"""Of a rank, unless it is asked for more."""


class Loadable(Protocol):
    """An item whose image is not opened yet, as `data_pipeline.layouts.eval_items.EvalItem`."""

    def load(self, opened: MutableMapping[Any, Image.Image]) -> Item:
        """The item, its image decoded. opened: images of the same batch. Raises DataError."""

    def outline(self) -> Item:
        """The item with a blank image of its size. Raises DataError or OSError."""

    def digest(self) -> bytes:
        """Hash of its content. Raises DataError or OSError."""


AnyItem: TypeAlias = Item | Loadable
"""What `encode_items` takes; an Item has its image decoded already."""


def outline(item: AnyItem) -> Item:
    """What tells the item's length. Raises DataError or OSError."""
    return item if isinstance(item, Item) else item.outline()


def digest(item: AnyItem) -> bytes:
    """Hash of what the model sees of the item: equal ones mean equal vectors. Raises DataError or OSError."""
    if not isinstance(item, Item):
        return item.digest()
    pixels = b"" if item.image is None else repr(item.image.size).encode() + item.image.tobytes()
    parts = (item.text.encode(), pixels, repr(item.box).encode())
    return hashlib.sha256(b"|".join(hashlib.sha256(part).digest() for part in parts)).digest()


@dataclass(frozen=True, kw_only=True)
class LoadedBatch:
    """Inputs of the items of a batch that can be used."""

    positions: tuple[int, ...]
    """Of these items, a row of the inputs each."""
    inputs: ModelInputs
    """Empty where no item can be used."""
    refused: Mapping[int, str]
    """{position: why the item cannot be used}."""

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> LoadedBatch:
        """See `data_pipeline.handover.HasTensors`."""
        return replace(self, inputs={name: move(tensor) for name, tensor in self.inputs.items()})

    def pin_memory(self) -> LoadedBatch:
        """Called by torch's DataLoader."""
        return self.map_tensors(Tensor.pin_memory)


@dataclass(kw_only=True)
class _Batches(Dataset[LoadedBatch | HandedBatch[LoadedBatch]]):
    process: ProcessItems
    items: Sequence[AnyItem]
    batches: Sequence[Sequence[int]]
    slots: Slots

    def __getitem__(self, number: int) -> LoadedBatch | HandedBatch[LoadedBatch]:
        batch = load_batch(self.process, self.items, self.batches[number])
        worker = get_worker_info()
        return self.slots.hand(batch, worker.id) if worker else batch


def workers_beside(device: torch.device) -> int:
    """How many processes of this rank may load: its share of the cores, at most MOST_WORKERS, beside a GPU.
    On a CPU the model computes on those cores: none."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count() or 1)
    return max(1, min(MOST_WORKERS, cores // ranks_here - 1))


def load_batch(process: ProcessItems, items: Sequence[AnyItem], positions: Sequence[int]) -> LoadedBatch:
    """The inputs of these items. One that cannot be loaded or that the processor refuses is left out, with
    its reason."""
    opened: dict[Any, Image.Image] = {}
    loaded: dict[int, Item] = {}
    refused: dict[int, str] = {}
    for position in positions:
        item = items[position]
        try:
            loaded[position] = item if isinstance(item, Item) else item.load(opened)
        except DataError as error:
            refused[position] = str(error)
    try:
        inputs = process(list(loaded.values())) if loaded else {}
    except DataError:  # it may not say which of them
        for position, item in list(loaded.items()):
            try:
                process([item])
            except DataError as error:
                refused[position] = str(error)
                del loaded[position]
        inputs = process(list(loaded.values())) if loaded else {}
    return LoadedBatch(positions=tuple(loaded), inputs=inputs, refused=refused)


def loaded_batches(
    process: ProcessItems, items: Sequence[AnyItem], batches: Sequence[Sequence[int]], *, num_workers: int
) -> Generator[LoadedBatch]:
    """Each batch of positions in turn, prepared ahead by `num_workers` processes; 0: by this one, when it is
    asked for.

    A batch's tensors are valid until the next one is asked for. Raises DataError when a worker dies. The
    random state of this process is left as it is.
    """
    num_workers = min(num_workers, len(batches))
    slots = Slots(num_workers, slots_per_worker=PREFETCH + 1)
    loader = DataLoader(
        _Batches(process=process, items=items, batches=batches, slots=slots),
        batch_size=None,
        sampler=range(len(batches)),
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,  # the slots are inherited
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_outlive_ctrl_c if num_workers else None,
    )
    others = set(multiprocessing.active_children())
    found = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    try:
        for _ in batches:
            batch = _next(found)
            yield batch.open() if isinstance(batch, HandedBatch) else batch
    finally:
        if num_workers:  # torch has no public name for it
            found._shutdown_workers()  # type: ignore[attr-defined]
        for worker in workers:
            worker.kill()


def _outlive_ctrl_c(_: int) -> None:
    """It is for the main process, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _next(found: Any) -> LoadedBatch | HandedBatch[LoadedBatch]:
    try:
        return next(found)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that loads items died ({error}); if it was killed for memory, lower --num_workers "
            "or --batch_size"
        ) from error
