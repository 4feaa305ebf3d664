"""What the fused similarity is made of, set by set: the share of each of the four patterns.

In scores.json {patterns: [{name, num_pairs, global_global, fine_global, global_fine, fine_fine}]}; a model
without fine vectors has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from agff.embedder import Embedder
from agff.similarity import PATTERNS, pattern_shares
from launcher.evaluation.benchmarks import Benchmark
from launcher.evaluation.questions import asked_of


@dataclass(frozen=True, kw_only=True)
class PatternUse:
    """Shares in percent of a set's right pairs, mean of softmax_p(s_p / beta): dS/ds_p, README, Method 1."""

    num_pairs: int
    """A query and its truth, drawn evenly from the set where it has more."""
    global_global: float
    fine_global: float
    global_fine: float
    fine_fine: float

    @property
    def shares(self) -> tuple[float, ...]:
        """In the order of agff.similarity.PATTERNS."""
        return self.global_global, self.fine_global, self.global_fine, self.fine_fine


Patterns: TypeAlias = Mapping[str, PatternUse]
"""By the name of the set."""


def pattern_use(model: Embedder, benchmark: Benchmark, said: Any) -> PatternUse | None:
    """Of one set, from its embeddings; None where there are no fine vectors. said: `judges.model_says`."""
    asked = asked_of(benchmark, said)
    if asked is None or asked.vectors_NMD.shape[1] == 1:
        return None
    queries = [question.query for question in asked.questions]
    truths = [question.right[0] for question in asked.questions]
    vectors_NMD = asked.vectors_NMD
    shares = pattern_shares(vectors_NMD[queries], vectors_NMD[truths], beta=model.fusion.beta)
    of_pattern = {name: 100 * share for name, share in zip(PATTERNS, shares.tolist(), strict=True)}
    return PatternUse(num_pairs=len(queries), **of_pattern)


def pattern_values(patterns: Patterns) -> list[dict[str, Any]]:
    """JSON values."""
    return [{"name": name, **asdict(use)} for name, use in patterns.items()]


def read_patterns(values: Mapping[str, Any], use_of: Callable[..., PatternUse]) -> Patterns:
    """What `pattern_values` wrote. use_of: (class, values) -> use, checked.

    Raises ValueError, TypeError or KeyError for what `pattern_values` would not write.
    """
    return {entry["name"]: use_of(PatternUse, entry) for entry in values.get("patterns", [])}
