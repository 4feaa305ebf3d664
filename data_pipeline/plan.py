"""Who reads what, at which step: a pure function of integers. No state, no byte read, the same on every machine.

A step's global batch is a list of single-source sub-batches. Which source a sub-batch comes from is fixed by quotas over
periods of PERIOD sub-batches; which samples it holds, by the source's endless row of epochs: each epoch permutes the shards
and mixes the samples of WINDOW neighbouring shards, so that reads stay near-sequential. Both are looked up directly, so
resume is a seek. (Ours.)
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agff.errors import ConfigError
from data_pipeline.manifest import Manifest

PERIOD = 1024
"""Sub-batches after which each source has had exactly its quota."""
WINDOW = 8
"""Shards whose samples are mixed with one another."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which sources make a global batch, and in what shares."""

    weights: Mapping[str, float] | None = None
    """Share of the sub-batches of each source, relative to the others; None: its number of samples."""
    sub_batch_size: int
    """Pairs in turn from one source."""


class Plan:
    """The order of all samples for one (manifest, mixture, seed, global batch size)."""

    def __init__(self, manifest: Manifest, mixture: Mixture, *, seed: int, global_batch_size: int) -> None:
        """Raises ConfigError for a mixture that the manifest cannot serve."""
        _check(manifest, mixture, global_batch_size)
        self.source_names = tuple(sorted(mixture.weights or manifest.sources))
        self._shard_sizes = [
            np.array([shard.num_samples for shard in manifest.sources[name].shards]) for name in self.source_names
        ]
        weights = mixture.weights or {name: manifest.sources[name].num_samples for name in self.source_names}
        self._quota = _quotas(np.array([weights[name] for name in self.source_names], dtype=np.float64))
        self._seed, self._size, self._sub_batch = seed, global_batch_size, mixture.sub_batch_size
        decided_by = {
            "manifest": manifest.fingerprint,
            "weights": {name: float(weights[name]) for name in self.source_names},
            "sub_batch_size": mixture.sub_batch_size,
            "seed": seed,
            "global_batch_size": global_batch_size,
        }
        self.fingerprint = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
        """Equal for equal orders; stored in checkpoints."""

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """(global_batch_size, 2): index into `source_names`, index of the sample in that source. Looked up, not replayed."""
        return self.rank_rows(step, rank=0, world_size=1)

    def rank_rows(self, step: int, *, rank: int, world_size: int) -> NDArray[np.int64]:
        """The rank's consecutive share of the global batch. The global batch does not depend on the number of ranks."""
        if self._size % world_size:
            raise ValueError(f"global batch of {self._size} rows for {world_size} ranks")
        local, per_step = self._size // world_size, self._size // self._sub_batch
        start, stop = rank * local, (rank + 1) * local
        touched = range(start // self._sub_batch, -(-stop // self._sub_batch))
        rows = np.concatenate([self._sub_batch_rows(step * per_step + index) for index in touched])
        return rows[start - touched.start * self._sub_batch :][:local]

    def redraw(self, step: int, row: int, *, attempt: int) -> int:
        """Index of another sample of the same source, for a row of the global batch that cannot be decoded.

        A function of (seed, step, row, attempt), so every run redraws the same; attempt counts from 1.
        """
        source, _ = self._source_of(step * (self._size // self._sub_batch) + row // self._sub_batch)
        generator = np.random.default_rng([self._seed, 3, step, row, attempt])
        return int(generator.integers(self._shard_sizes[source].sum()))

    def _sub_batch_rows(self, index: int) -> NDArray[np.int64]:
        source, turn = self._source_of(index)
        position = np.arange(turn * self._sub_batch, (turn + 1) * self._sub_batch)
        epoch, within = np.divmod(position, self._shard_sizes[source].sum())
        samples = [self._samples(source, int(e), within[epoch == e]) for e in np.unique(epoch)]
        return np.stack([np.full_like(position, source), np.concatenate(samples)], axis=1)

    def _source_of(self, index: int) -> tuple[int, int]:
        """(source, how many sub-batches of it came before) of the index-th sub-batch of the run."""
        period, place = divmod(index, PERIOD)
        order = self._period_order(period)
        source = int(order[place])
        return source, period * int(self._quota[source]) + int((order[:place] == source).sum())

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a plan lives as long as its run
    def _period_order(self, period: int) -> NDArray[np.int64]:
        order = np.repeat(np.arange(len(self._quota)), self._quota)
        return np.random.default_rng([self._seed, 1, period]).permutation(order)

    def _samples(self, source: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices at increasing positions of one epoch."""
        starts, window_ends, first_sample = self._epoch(source, epoch)
        windows = np.searchsorted(window_ends, positions, side="right")
        found = []
        for window in np.unique(windows):
            begin = int(window_ends[window - 1]) if window else 0
            order = self._window_order(source, epoch, int(window), int(window_ends[window]) - begin)
            mixed = begin + order[positions[windows == window] - begin]
            shard = np.searchsorted(starts, mixed, side="right") - 1
            found.append(first_sample[shard] + mixed - starts[shard])
        return np.concatenate(found)

    @functools.lru_cache(maxsize=128)  # noqa: B019
    def _epoch(self, source: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(start of each shard in the epoch, end of each window, first sample of each shard), shards in epoch order."""
        sizes = self._shard_sizes[source]
        order = np.random.default_rng([self._seed, 2, source, epoch]).permutation(len(sizes))
        first_sample = (np.cumsum(sizes) - sizes)[order]
        ends = np.cumsum(sizes[order])
        window_ends = ends[np.minimum(np.arange(WINDOW - 1, len(sizes) + WINDOW - 1, WINDOW), len(sizes) - 1)]
        return ends - sizes[order], window_ends, first_sample

    @functools.lru_cache(maxsize=128)  # noqa: B019
    def _window_order(self, source: int, epoch: int, window: int, size: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 4, source, epoch, window]).permutation(size)


def _quotas(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sub-batches of each source in a period: proportional, at least one, PERIOD in all (largest remainder)."""
    exact = weights / weights.sum() * (PERIOD - len(weights))
    quota = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(quota - exact, kind="stable")[: PERIOD - len(weights) - int(quota.sum())]
    quota[largest_remainders] += 1
    return quota + 1


def _check(manifest: Manifest, mixture: Mixture, global_batch_size: int) -> None:
    names = list(manifest.sources if mixture.weights is None else mixture.weights)
    if not names:
        raise ConfigError("the mixture names no source; give data.weights at least one, or leave it null for all")
    if len(names) > PERIOD // 2:
        raise ConfigError(f"the mixture names {len(names)} sources, at most {PERIOD // 2} are supported")
    if unknown := sorted(set(names) - set(manifest.sources)):
        raise ConfigError(
            f"data.weights names {', '.join(unknown)}, absent from the shards; "
            f"they hold {', '.join(sorted(manifest.sources))}"
        )
    if global_batch_size % mixture.sub_batch_size:
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of data.sub_batch_size={mixture.sub_batch_size}"
        )
    for name in names:
        if mixture.weights is not None and not mixture.weights[name] > 0:
            raise ConfigError(f"data.weights.{name}={mixture.weights[name]} must be > 0; leave a source out to drop it")
        num_samples = manifest.sources[name].num_samples
        if num_samples < mixture.sub_batch_size:
            raise ConfigError(
                f"source {name} holds {num_samples} samples, fewer than data.sub_batch_size={mixture.sub_batch_size}; "
                "lower it, or leave the source out with data.weights"
            )
