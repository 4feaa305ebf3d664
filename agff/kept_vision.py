"""A frozen tower runs once a step: its output waits for the second pass, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

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
    number of calls of `encode` that are needed to the number that is made.
    """
    all_new = new_images(chunks)
    num_calls = agree(sum(bool(new) for new in all_new))
    device = torch.device("cpu")
    features_of: dict[int, Tensor] = {}
    looks: list[ModelInputs] = []
    done: list[ModelInputs] = []
    for chunk, new in zip(chunks, all_new, strict=True):
        ids, num_rows = chunk[IMAGE_IDS].tolist(), tower.num_rows(chunk)
        is_all_new = len(new) == len(ids)
        if new:
            looks.append(tower.image_inputs(chunk) if is_all_new else tower.select(chunk, new))
            features = encode(looks[-1])
            device, kept = features.device, keep(features)
            parts = kept.split([num_rows[place] for place in new])
            features_of |= dict(zip((ids[place] for place in new), parts, strict=True))
        if not is_all_new:
            parts = tuple(features_of[content_id] for content_id in ids)
            kept = parts[0]
            if len(parts) > 1:
                kept = keep(torch.cat([part.to(device, non_blocking=True) for part in parts]))
        done.append(tower.with_features(chunk, kept))
    for _ in range(num_calls - len(looks)):
        encode(min(looks, key=lambda look: look["pixel_values"].numel()))
    return done


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes, as torch counts them."""

    total: int
    usable: int
    """Free, or reserved by this process."""
    peak: int
    """The most that was allocated at once so far."""


def cuda_memory(device: torch.device) -> DeviceMemory:
    """Of a GPU, now."""
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        total=total,
        usable=free + torch.cuda.memory_reserved(device),
        peak=torch.cuda.max_memory_allocated(device),
    )


class FeatureMemory:
    """Where kept features wait for the second pass; `where` is the setting.

    "host": in page-locked host memory. "gpu": on the device for as long as they fit there, else on the host.
    They fit beside the highest peak of the steps before, with DEVICE_RESERVE left free. The first step, of
    whose peak nothing is known, keeps on the host. Without an accelerator there is one memory.
    """

    def __init__(
        self,
        where: KeepVision,
        device: torch.device,
        *,
        memory_of: Callable[[torch.device], DeviceMemory] = cuda_memory,
    ) -> None:
        self.where, self._device, self._memory_of = where, device, memory_of
        self._highest_peak: int | None = None  # without what was kept then
        self._on_device = self._room = 0

    def start_step(self) -> None:
        """Nothing is kept; what fits on the device is computed."""
        self._on_device = self._room = 0
        if self.where == "gpu" and self._highest_peak is not None:
            now = self._memory_of(self._device)
            self._room = now.usable - self._highest_peak - int(DEVICE_RESERVE * now.total)

    def end_step(self) -> None:
        """Take note of the step's peak."""
        if self._device.type == "cuda":
            peak = self._memory_of(self._device).peak - self._on_device
            self._highest_peak = max(peak, self._highest_peak or 0)

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
