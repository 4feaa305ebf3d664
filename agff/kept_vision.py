"""A frozen tower runs once a step: its output waits for the second pass, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from agff.batch import ModelInputs
from agff.shared_images import IMAGE_IDS
from agff.vision import VisionTower

KeepVision = Literal["gpu", "host", "off"]
DEVICE_RESERVE = 0.1
"""Share of a device's memory that kept features leave free: what a later step may need more, fragments."""


def new_images(chunks: Sequence[ModelInputs]) -> list[list[int]]:
    """For each chunk, which of its images no chunk before it holds; the chunks are on the CPU."""
    seen: set[int] = set()
    new = []
    for chunk in chunks:
        ids = chunk[IMAGE_IDS].tolist()
        new.append([place for place, content_id in enumerate(ids) if content_id not in seen])
        seen.update(ids)
    return new


def with_image_features(
    chunks: Sequence[ModelInputs],
    tower: VisionTower,
    *,
    encode: Callable[[ModelInputs], Tensor],
    keep: Callable[[Tensor], Tensor],
    agree: Callable[[int], int],
) -> list[ModelInputs]:
    """The chunks with the tower's output in place of their pixels.

    Each different image of the step is encoded once, with those of its chunk that are new. `encode` takes
    inputs on the CPU to features on the device, `keep` brings those to where they wait. `agree` takes the
    number of calls of `encode` that are needed to the number that is made. Chunks without an image, as all of
    a run on texts alone are, stay as they are.
    """
    if not any(len(chunk[IMAGE_IDS]) for chunk in chunks):
        return list(chunks)
    all_new = new_images(chunks)
    num_calls = agree(sum(bool(new) for new in all_new))
    device = torch.device("cpu")
    kept_of: dict[int, Tensor] = {}
    tower_inputs: list[ModelInputs] = []
    done: list[ModelInputs] = []
    for chunk, new in zip(chunks, all_new, strict=True):
        ids, num_rows = chunk[IMAGE_IDS].tolist(), tower.num_rows(chunk)
        is_all_new = len(new) == len(ids)
        parts_of = kept_of
        if new:
            tower_inputs.append(tower.image_inputs(chunk) if is_all_new else tower.select(chunk, new))
            features = encode(tower_inputs[-1])
            device = features.device
            parts = features.split([num_rows[place] for place in new])
            parts_of = kept_of | dict(zip((ids[place] for place in new), parts, strict=True))
        if is_all_new:
            kept = keep(features)
        elif len(ids) == 1:
            kept = kept_of[ids[0]]
        else:  # what is new waits only as a part of the whole
            kept = keep(torch.cat([parts_of[each].to(device, non_blocking=True) for each in ids]))
        kept_of = dict(zip(ids, kept.split(num_rows), strict=True)) | kept_of
        done.append(tower.with_features(chunk, kept))
    for _ in range(num_calls - len(tower_inputs)):
        encode(min(tower_inputs, key=lambda inputs: inputs["pixel_values"].numel()))
    return done


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes, as torch counts them."""

    total: int
    usable: int
    """Free, or reserved by this process."""
    peak: int
    """The most that was allocated at once since the reader's `restart_peak`."""


class MemoryReader(Protocol):
    """Reads the memory of one device."""

    def now(self) -> DeviceMemory:
        """What it is now."""

    def restart_peak(self) -> None:
        """The peak is what is allocated now, and whatever is higher later."""


@dataclass(frozen=True)
class CudaMemory(MemoryReader):
    """Of a GPU. torch has one peak for the whole process."""

    device: torch.device

    def now(self) -> DeviceMemory:
        """See MemoryReader."""
        free, total = torch.cuda.mem_get_info(self.device)
        return DeviceMemory(
            total=total,
            usable=free + torch.cuda.memory_reserved(self.device),
            peak=torch.cuda.max_memory_allocated(self.device),
        )

    def restart_peak(self) -> None:
        """See MemoryReader."""
        torch.cuda.init()  # before it there are no statistics, and restarting them fails
        torch.cuda.reset_peak_memory_stats(self.device)


class FeatureMemory:
    """Where kept features wait for the second pass; `where` is the setting.

    "host": in page-locked host memory. "gpu": on the device for as long as they fit there, else on the host.
    They fit beside the highest peak of the steps before, with DEVICE_RESERVE left free. The first step, of
    whose peak nothing is known, keeps on the host. Without an accelerator there is one memory.

    Each step has a peak of its own, so the reader's is restarted here, and nowhere else: `highest_peak` is
    what the log shows.
    """

    def __init__(
        self, where: KeepVision, device: torch.device, *, reader: MemoryReader | None = None
    ) -> None:
        """What was allocated before counts for no peak. reader: of the device; CudaMemory by default."""
        self.where, self._device = where, device
        self._reader = CudaMemory(device) if reader is None and device.type == "cuda" else reader
        self._peak_so_far = 0
        self._peak_without_kept: int | None = None  # the highest of any step
        self._on_device = self._room = 0
        if self._reader is not None:
            self._reader.restart_peak()

    @property
    def highest_peak(self) -> int | None:
        """The most bytes of the device that were allocated at once since this was made; None for a CPU."""
        return None if self._reader is None else max(self._peak_so_far, self._reader.now().peak)

    def start_step(self) -> None:
        """Nothing is kept; what fits on the device is computed. At the start of every step."""
        self._on_device = self._room = 0
        if self._reader is None:
            return
        now = self._reader.now()
        self._peak_so_far = max(self._peak_so_far, now.peak)
        self._reader.restart_peak()
        if self.where == "gpu" and self._peak_without_kept is not None:
            self._room = now.usable - self._peak_without_kept - int(DEVICE_RESERVE * now.total)

    def end_step(self) -> None:
        """Take note of the step's peak."""
        if self._reader is not None:
            peak = self._reader.now().peak - self._on_device
            self._peak_without_kept = max(peak, self._peak_without_kept or 0)

    def fits(self, features: Tensor) -> bool:
        """Whether these may stay on the device too; then they count from now on."""
        if self._on_device + features.nbytes > self._room:
            return False
        self._on_device += features.nbytes
        return True

    def keep(self, features: Tensor) -> Tensor:
        """The features where they wait; a copy to the host is ordered before what the device does next."""
        if self._device.type == "cpu":
            return features
        if self.fits(features):
            return features
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=torch.cuda.is_available())
        return host.copy_(features, non_blocking=True)
