"""Which candidates become negatives: against a slow loop, and each rule by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agff.errors import ConfigError
from agff.similarity import fused_similarity
from launcher.mining import ranking
from launcher.mining.ranking import best_candidates
from launcher.mining.rules import MiningRules, choose


def slow(
    similarity: list[float], positive: int, excluded: list[int], rules: MiningRules
) -> tuple[list[int], dict[str, int]]:
    """One query, candidate by candidate."""
    order = sorted(
        (i for i in range(len(similarity)) if i not in excluded), key=lambda i: (-similarity[i], i)
    )
    looked_at = order[rules.skip_ranks : rules.max_rank]
    limit = math.inf if rules.margin is None else np.float32(similarity[positive]) + np.float32(rules.margin)
    kept = [i for i in looked_at if not similarity[i] > limit]
    dropped = {
        "skip_ranks": len(order[: rules.skip_ranks]),
        "max_rank": len(order[rules.max_rank :]),
        "margin": len(looked_at) - len(kept),
    }
    return kept[: rules.num_negatives], dropped


@pytest.mark.parametrize("margin", [None, 0.0, 0.02, -1.5])
@pytest.mark.parametrize(("skip", "most", "k"), [(0, 50, 3), (2, 9, 4), (0, 4, 4), (5, 6, 1)])
@pytest.mark.parametrize("block", [4, 7, 100])
def test_mining_equals_a_slow_loop(
    monkeypatch: pytest.MonkeyPatch, margin: float | None, skip: int, most: int, k: int, block: int
) -> None:
    """30 candidates, each vector there twice, so that half of the comparisons are ties."""
    monkeypatch.setattr(ranking, "CANDIDATES", block)
    rules = MiningRules(num_negatives=k, skip_ranks=skip, max_rank=most, margin=margin)
    random = np.random.default_rng(0)
    vectors = random.integers(-2, 3, (45, 2, 4)).astype(np.float32)  # whole numbers: ties are exact
    vectors[20:35] = vectors[5:20]
    candidates = np.arange(5, 35)
    queries = vectors[35:]
    positive = random.integers(0, 30, 10)
    excluded = [sorted({int(p), *map(int, random.integers(0, 30, 3))}) for p in positive]
    ranked = best_candidates(
        queries,
        vectors,
        candidates,
        positive_B=positive,
        excluded=excluded,
        num_ranks=most,
        beta=0.5,
        device=torch.device("cpu"),
    )
    allowed_B = torch.tensor([30 - len(each) for each in excluded])
    chosen = choose(ranked, rules, num_allowed_B=allowed_B)
    whole = fused_similarity(torch.from_numpy(queries), torch.from_numpy(vectors[candidates]), beta=0.5)
    expected = [
        slow(row, int(p), own, rules) for row, p, own in zip(whole.tolist(), positive, excluded, strict=True)
    ]
    found = [[index for index in row if index >= 0] for row in chosen.index_BK.tolist()]
    assert found == [kept for kept, _ in expected]
    for rule, count in chosen.dropped.items():
        assert count == sum(dropped[rule] for _, dropped in expected), rule
    torch.testing.assert_close(ranked.positive_B, whole[torch.arange(10), torch.from_numpy(positive)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_negatives": 0}, "--num_negatives 0 must be >= 1"),
        ({"skip_ranks": -1}, "--skip_ranks -1 must be >= 0"),
        ({"skip_ranks": 8, "max_rank": 9}, "--max_rank 9 leaves fewer than --num_negatives 2"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MiningRules(**{"num_negatives": 2, "skip_ranks": 0, "max_rank": 100, "margin": None, **values})
