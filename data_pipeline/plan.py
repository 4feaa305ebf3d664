"""Who reads what, at which step: a pure function of integers. No state, no byte read, equal everywhere.

A step's global batch is a list of single-source sub-batches. Which source a sub-batch comes from is fixed by
quotas over periods of PERIOD sub-batches; which samples it holds, by the source's endless row of epochs: each
epoch permutes the shards and mixes the samples of WINDOW neighbouring shards, so that reads stay
near-sequential. Both are looked up directly, so resume is a seek. (Ours.)

An epoch of a source is each of its samples once. With a cap it is each sample of a fixed part of it once: the
same share of every shard, chosen by the seed, so that a source whose rows are sorted keeps all its kinds.
Weights change how soon a source's next epoch begins, never what an epoch holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agff.errors import ConfigError
from data_pipeline.manifest import Manifest

VERSION = 2
"""Of the order below; a checkpoint of another one cannot be continued."""
RANK_ROWS = "rank::world_size"
"""Rows of the global batch that a rank takes, as a slice. Not part of the order: another rule gives the same
global batches and the same loss, up to rounding and dropout, as another number of ranks does."""
PERIOD = 1024
"""Sub-batches after which each source has had exactly its quota."""
WINDOW = 8
"""Shards whose samples are mixed with one another."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which sources make a global batch, and in what shares."""

    weights: Mapping[str, float] | None = None
    """Share of each source in the sub-batches, relative to the others; None: its capped number of samples."""
    caps: int | Mapping[str, int] | None = None
    """Samples used of a source at most: one number for all, or for some by name."""
    sub_batch_size: int
    """Pairs in turn from one source."""


class Plan:
    """The order of all samples for one (manifest, mixture, seed, global batch size)."""

    def __init__(self, manifest: Manifest, mixture: Mixture, *, seed: int, global_batch_size: int) -> None:
        """Raises ConfigError for a mixture that the manifest cannot serve."""
        _check(manifest, mixture, global_batch_size)
        self.source_names = tuple(sorted(mixture.weights or manifest.sources))
        sources = [manifest.sources[name] for name in self.source_names]
        self._shard_sizes = [np.array([shard.num_samples for shard in source.shards]) for source in sources]
        self._kept_sizes = [
            _share_out(_cap(mixture, name), sizes)
            for name, sizes in zip(self.source_names, self._shard_sizes, strict=True)
        ]
        num_kept = [int(sizes.sum()) for sizes in self._kept_sizes]
        weights = [
            float((mixture.weights or {}).get(n, kept))
            for n, kept in zip(self.source_names, num_kept, strict=True)
        ]
        self._quota = _quotas(np.array(weights))
        self._seed, self._size, self._sub_batch = seed, global_batch_size, mixture.sub_batch_size
        self.description: dict[str, Any] = {
            "version": VERSION,
            "seed": seed,
            "global_batch_size": global_batch_size,
            "sub_batch_size": mixture.sub_batch_size,
            "rank_rows": RANK_ROWS,
            "sources": {
                name: {"shards": source.fingerprint, "samples": kept, "share": int(quota)}
                for name, source, kept, quota in zip(
                    self.source_names, sources, num_kept, self._quota, strict=True
                )
            },
        }
        """All that decides the order, as checkpoints store it. share: of PERIOD sub-batches."""

    @property
    def num_samples(self) -> dict[str, int]:
        """Samples in an epoch of each source."""
        return {name: int(kept.sum()) for name, kept in zip(self.source_names, self._kept_sizes, strict=True)}

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """(global_batch_size, 2): index into `source_names`, sample in that source. No step is replayed."""
        return self.rank_rows(step, rank=0, world_size=1)

    def row_numbers(self, *, rank: int, world_size: int) -> NDArray[np.int64]:
        """Which rows of the global batch are the rank's: every `world_size`-th.

        So each rank holds of each source as many pairs as the others, and its chunks cost what theirs do
        (consecutive rows: one rank has the images, another the class names, and all wait for the first).
        """
        if self._size % world_size:
            raise ValueError(f"global batch of {self._size} rows for {world_size} ranks")
        return np.arange(rank, self._size, world_size)

    def rank_rows(self, step: int, *, rank: int, world_size: int) -> NDArray[np.int64]:
        """The rank's rows of the global batch, which does not depend on the number of ranks."""
        return self._rows(step, self.row_numbers(rank=rank, world_size=world_size))

    def shards(self, steps: Iterable[int]) -> set[tuple[str, int]]:
        """(source, index of the shard) of whatever any rank reads in these steps."""
        rows = np.concatenate([self.global_batch(step) for step in steps])
        found = set()
        for source in np.unique(rows[:, 0]):
            shards = np.searchsorted(self._first_samples(source), rows[rows[:, 0] == source, 1], side="right")
            found |= {(self.source_names[source], int(shard) - 1) for shard in np.unique(shards)}
        return found

    def redraw(self, step: int, row: int, *, attempt: int) -> int:
        """Index of another sample of the same source, for a row of the global batch that cannot be decoded.

        A function of (seed, step, row, attempt), so every run redraws the same; attempt counts from 1.
        """
        source = int(self._rows(step, np.array([row]))[0, 0])
        generator = np.random.default_rng([self._seed, 3, step, row, attempt])
        ends = np.cumsum(self._kept_sizes[source])
        position = int(generator.integers(ends[-1]))
        shard = np.searchsorted(ends, [position], side="right")
        return int(
            self._sample_numbers(source, shard, position - (ends[shard] - self._kept_sizes[source][shard]))[0]
        )

    def region(self, count: int, *, step: int, row: int, attempt: int) -> int:
        """Which of `count` regions a row of the global batch takes of its sample: a function of (seed, step,
        row, attempt) as `redraw` is, with attempt 0 for the sample of the plan."""
        return int(np.random.default_rng([self._seed, 6, step, row, attempt]).integers(count))

    def _rows(self, step: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these increasing numbers. One lookup a source, however many sub-batches it has."""
        sub_batch = step * (self._size // self._sub_batch) + numbers // self._sub_batch
        source, turn = self._sources_of(sub_batch)
        position = turn * self._sub_batch + numbers % self._sub_batch
        rows = np.stack([source, np.empty_like(source)], axis=1)
        for one in np.unique(source):
            epoch, within = np.divmod(position[source == one], self._kept_sizes[one].sum())
            rows[source == one, 1] = np.concatenate(
                [self._samples(int(one), int(e), within[epoch == e]) for e in np.unique(epoch)]
            )
        return rows

    def _sources_of(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, how many sub-batches of it came before) of the index-th sub-batches of the run."""
        period, place = np.divmod(index, PERIOD)
        source, turn = np.empty_like(index), np.empty_like(index)
        for one in np.unique(period):
            order, turn_in_period = self._period_order(int(one))
            own = period == one
            source[own] = order[place[own]]
            turn[own] = one * self._quota[source[own]] + turn_in_period[place[own]]
        return source, turn

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a plan lives as long as its run
    def _period_order(self, period: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source of each sub-batch of the period, how many of it came before in the period)."""
        order = np.repeat(np.arange(len(self._quota)), self._quota)
        order = np.random.default_rng([self._seed, 1, period]).permutation(order)
        turn = np.empty_like(order)
        turn[np.argsort(order, kind="stable")] = np.concatenate([np.arange(quota) for quota in self._quota])
        return order, turn

    def _samples(self, source: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers at increasing positions of one epoch."""
        order, starts, window_ends = self._epoch(source, epoch)
        windows = np.searchsorted(window_ends, positions, side="right")
        found = []
        for window in np.unique(windows):
            begin = int(window_ends[window - 1]) if window else 0
            mixing = self._window_order(source, epoch, int(window), int(window_ends[window]) - begin)
            mixed = begin + mixing[positions[windows == window] - begin]
            place = np.searchsorted(starts, mixed, side="right") - 1
            found.append(self._sample_numbers(source, order[place], mixed - starts[place]))
        return np.concatenate(found)

    def _sample_numbers(
        self, source: int, shards: NDArray[np.int64], within: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Number in the source of the `within`-th kept sample of each shard."""
        kept = within.copy()
        for shard in np.unique(shards):
            if self._kept_sizes[source][shard] < self._shard_sizes[source][shard]:
                kept[shards == shard] = self._kept(source, int(shard))[within[shards == shard]]
        return self._first_samples(source)[shards] + kept

    @functools.lru_cache(maxsize=PERIOD)  # noqa: B019 - a plan lives as long as its run
    def _first_samples(self, source: int) -> NDArray[np.int64]:
        return np.cumsum(self._shard_sizes[source]) - self._shard_sizes[source]

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _kept(self, source: int, shard: int) -> NDArray[np.int64]:
        """Places in the shard of the samples that a cap leaves of it."""
        generator = np.random.default_rng([self._seed, 5, source, shard])
        return np.sort(
            generator.permutation(self._shard_sizes[source][shard])[: self._kept_sizes[source][shard]]
        )

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def _epoch(
        self, source: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(shards in the epoch's order, where each starts in the epoch, end of each window)."""
        sizes = self._kept_sizes[source]
        order = np.random.default_rng([self._seed, 2, source, epoch]).permutation(len(sizes))
        ends = np.cumsum(sizes[order])
        window_ends = ends[np.minimum(np.arange(WINDOW - 1, len(sizes) + WINDOW - 1, WINDOW), len(sizes) - 1)]
        return order, ends - sizes[order], window_ends

    @functools.lru_cache(maxsize=128)  # noqa: B019
    def _window_order(self, source: int, epoch: int, window: int, size: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 4, source, epoch, window]).permutation(size)


def _cap(mixture: Mixture, name: str) -> int | None:
    return mixture.caps.get(name) if isinstance(mixture.caps, Mapping) else mixture.caps


def _share_out(cap: int | None, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many samples are kept of each shard: `cap` in all, the same share of each."""
    total = int(sizes.sum())
    if cap is None or cap >= total:
        return sizes
    return np.diff(np.cumsum(sizes) * cap // total, prepend=0)


def _quotas(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sub-batches of each source in a period: by largest remainder, at least one, PERIOD in all."""
    exact = weights / weights.max() / (weights / weights.max()).sum() * (PERIOD - len(weights))
    quota = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(quota - exact, kind="stable")[: PERIOD - len(weights) - int(quota.sum())]
    quota[largest_remainders] += 1
    return quota + 1


def _check(manifest: Manifest, mixture: Mixture, global_batch_size: int) -> None:
    names = list(manifest.sources if mixture.weights is None else mixture.weights)
    if not names:
        raise ConfigError(
            "the mixture names no source; give data.weights at least one, or leave it null for all"
        )
    if len(names) > PERIOD // 2:
        raise ConfigError(f"the mixture names {len(names)} sources, at most {PERIOD // 2} are supported")
    if unknown := sorted(set(names) - set(manifest.sources)):
        raise ConfigError(
            f"data.weights names {', '.join(unknown)}, absent from the shards; "
            f"they hold {', '.join(sorted(manifest.sources))}"
        )
    if isinstance(mixture.caps, Mapping) and (unknown := sorted(set(mixture.caps) - set(manifest.sources))):
        raise ConfigError(f"data.caps names {', '.join(unknown)}, absent from the shards")
    if global_batch_size % mixture.sub_batch_size:
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of "
            f"data.sub_batch_size={mixture.sub_batch_size}"
        )
    if findings := [finding for name in names for finding in _findings(manifest, mixture, name)]:
        raise ConfigError("\n".join(findings))


def _findings(manifest: Manifest, mixture: Mixture, name: str) -> list[str]:
    """What keeps one source from being mixed in."""
    findings = []
    if mixture.weights is not None and not 0 < mixture.weights[name] < math.inf:
        findings.append(
            f"data.weights.{name}={mixture.weights[name]} must be > 0 and finite; "
            "leave a source out to drop it"
        )
    num_samples, cap = manifest.sources[name].num_samples, _cap(mixture, name)
    if num_samples == 0:
        findings.append(f"source {name} is empty; leave it out with data.weights")
    elif cap is not None and cap < mixture.sub_batch_size:
        findings.append(
            f"data.caps: {cap} samples of {name} are fewer than data.sub_batch_size={mixture.sub_batch_size}"
        )
    elif num_samples < mixture.sub_batch_size:
        findings.append(
            f"source {name} holds {num_samples} samples, fewer than "
            f"data.sub_batch_size={mixture.sub_batch_size}; lower it, or leave the source out with "
            "data.weights"
        )
    return findings
