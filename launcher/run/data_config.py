"""Which shards are read, and in what mixture: the recipe's section `data`."""

from __future__ import annotations

from dataclasses import dataclass, field

from agff.errors import ConfigError
from data_pipeline.remote import CacheConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards are read, and in what mixture."""

    shards: str
    """Folder written by launcher/prepare.py, or its URL: s3://, gs://, hf://, https:// (read through a local
    cache)."""
    weights: dict[str, float] | None = None
    """Share of the sub-batches each source gets, relative to the others; null: its number of samples."""
    caps: int | dict[str, int] | None = None
    """Samples used of a source at most, a fixed part spread over all its shards: one number for all, or some
    by name."""
    vectors: str | None = None
    """Folder of a teacher's vectors of these shards, written by launcher/embed.py; local. null: none."""
    with_negatives: bool = True
    """Explicit hard negatives, where a source has them, are candidates of the whole global batch."""
    sub_batch_size: int
    """Consecutive pairs of a global batch that come from one source; divides the global batch."""
    num_workers: int = 1
    """Loader processes of each rank; 0 loads in the training process. The batches do not depend on it."""
    max_bad_in_a_row: int = 10
    """Unusable samples drawn in a row for one row of a batch before all ranks stop."""
    check_hashes: bool = True
    """Compare every local shard's SHA-256 with the manifest before the first step; false compares names and
    sizes only. Remote shards are always compared when they are fetched."""
    stalled_after_s: float = 300
    """A batch that takes longer than this stops all ranks, with the name of the shard that a worker hangs
    at."""
    accept_changes: bool = False
    """Continue a run although its shards, mixture, seed or global batch changed: steps count on, the order is
    the new one, so samples of the running epoch may come twice or not at all."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.sub_batch_size < 1:
            raise ConfigError(f"data.sub_batch_size={self.sub_batch_size} must be >= 1")
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers={self.num_workers} must be >= 0")
        if self.max_bad_in_a_row < 0:
            raise ConfigError(f"data.max_bad_in_a_row={self.max_bad_in_a_row} must be >= 0")
        if self.stalled_after_s <= 0:
            raise ConfigError(f"data.stalled_after_s={self.stalled_after_s} must be > 0")
