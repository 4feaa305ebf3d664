"""How a global batch is encoded: the recipe's section `batch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agff.errors import ConfigError
from agff.kept_vision import KeepVision


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many pairs make a step, and how many are encoded at once."""

    global_batch_size: int
    """Pairs of one optimizer step over all ranks; every other pair's target is a negative."""
    chunk_size: int | Literal["auto"] | None = None
    """Items encoded at once; memory grows with it, the result does not change but for rounding. Three local
    batches hold all queries, targets and explicit negatives: one forward. Below that: GradCache. auto: what
    fits on the GPU, tried on the largest items before the first step and written into the run folder."""
    max_tokens_per_chunk: int | None = None
    """Instead of chunk_size: as many items of similar length at once as have this many tokens together,
    padding included."""
    first_pass_chunks: int = 4
    """Chunks that the first pass encodes at once: it keeps no graph. 1 is used where dropout is on."""
    keep_vision: KeepVision = "gpu"
    """Where the output of a frozen vision tower waits for the second pass, so that the tower runs once a
    step: gpu, as much as fits there, the rest in host memory; host; off, it runs in both passes."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "chunk_size", "max_tokens_per_chunk", "first_pass_chunks"):
            if getattr(self, name) not in (None, "auto") and getattr(self, name) < 1:
                raise ConfigError(f"batch.{name}={getattr(self, name)} must be >= 1")
        if (self.chunk_size is None) == (self.max_tokens_per_chunk is None):
            raise ConfigError(
                f"batch.chunk_size={self.chunk_size} and "
                f"batch.max_tokens_per_chunk={self.max_tokens_per_chunk}: give one of them and leave the "
                "other null"
            )
