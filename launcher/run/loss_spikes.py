"""Finding a step whose loss is far above those before it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW = 100
"""Steps looked back on; a run of fewer than a fifth of them is not judged."""
LEAST_DEVIATION = 0.01
"""Of the mean: a loss that hardly moves makes no spike of a ripple."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A loss, and what was usual before it."""

    loss: float
    mean: float
    standard_deviation: float

    @property
    def deviations(self) -> float:
        """Standard deviations above the mean."""
        return (self.loss - self.mean) / self.standard_deviation


class LossSpikes:
    """Judges one loss after the other (ours). Steps before the start of this process do not count."""

    def __init__(self, *, deviations: float | None) -> None:
        """deviations: standard deviations above the last steps' mean that make a spike; None: never."""
        self._limit = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def judge(self, loss: float) -> Spike | None:
        """The spike that this step is, if it is one. Losses that are not finite are passed over."""
        if self._limit is None or not math.isfinite(loss):
            return None
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < WINDOW // 5:
            return None
        mean = statistics.fmean(before)
        spike = Spike(
            loss=loss,
            mean=mean,
            standard_deviation=max(statistics.pstdev(before), LEAST_DEVIATION * abs(mean), 1e-12),
        )
        return spike if spike.deviations > self._limit else None
