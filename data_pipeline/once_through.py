"""Every pair of a shard folder once, in batches like those of the training: so held-out pairs are read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import Manifest
from data_pipeline.plan import Mixture, Plan


class OnceThrough(Plan):
    """A plan of `num_steps` steps that hold every sample (with a cap every kept one) at least once.

    As in the training a sub-batch is of one source, and sub-batches are mixed by the seed. The last sub-batch
    of a source, and the last global batch, are filled up with samples that come again. (Ours.)
    """

    def __init__(self, manifest: Manifest, mixture: Mixture, *, seed: int, global_batch_size: int) -> None:
        """mixture: without weights. Raises ConfigError as Plan does."""
        super().__init__(manifest, mixture, seed=seed, global_batch_size=global_batch_size)
        if mixture.weights is not None:
            raise ValueError("weights say how often samples come again, and here each comes once")
        parts = [
            (source, turn)
            for source, kept in enumerate(self._kept_sizes)
            for turn in range(-(-int(kept.sum()) // self._sub_batch))
        ]
        self._parts = np.random.default_rng([seed, 7]).permutation(np.array(parts, dtype=np.int64))
        self.num_steps = -(-len(parts) * self._sub_batch // global_batch_size)
        self.description = {**self.description, "order": "once through"}

    def _rows(self, step: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        index = step * (self._size // self._sub_batch) + numbers // self._sub_batch
        source, turn = self._parts[index % len(self._parts)].T
        position = turn * self._sub_batch + numbers % self._sub_batch
        rows = np.stack([source, np.empty_like(source)], axis=1)
        for one in np.unique(source):
            ends = np.cumsum(self._kept_sizes[one])
            own = position[source == one] % ends[-1]
            shard = np.searchsorted(ends, own, side="right")
            within = own - (ends[shard] - self._kept_sizes[one][shard])
            rows[source == one, 1] = self._sample_numbers(int(one), shard, within)
        return rows
