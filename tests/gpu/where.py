"""Which machines' ranks a check starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Where:
    """GPUs, or CPU ranks that stand in for them."""

    on_gpus: bool
    num_ranks: int

    @property
    def name(self) -> str:
        """Of the card."""
        return f"{self.num_ranks} x {torch.cuda.get_device_name()}" if self.on_gpus else "no GPU: CPU, gloo"

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cuda" if self.on_gpus else "cpu"

    def run(self, worker: Callable[..., Any], *arguments: Any, num_ranks: int | None = None) -> Any:
        """What rank 0's worker(*arguments) returned; on all ranks unless fewer are asked for."""
        found = run_ranks(
            worker,
            *arguments,
            world_size=num_ranks or self.num_ranks,
            timeout_s=1800 if self.on_gpus else 240,
            on_gpus=self.on_gpus,
        )
        return found[0]
