"""The shares of the four patterns in a set's right pairs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from agff.similarity import FusionConfig
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmeb_sets import SetInfo
from launcher.evaluation.pattern_use import pattern_use
from launcher.evaluation.scores_file import ScoresFile, read_results
from tests.launcher.colours import ColourModel, table_of

SET = EvalSet(
    **table_of("red", "blue", "<|image_1|>\n@r.png", "<|image_1|>\n@b.png"),
    info=SetInfo(meta_task="retrieval", in_distribution=True),
    queries=(0, 1),
    candidates=((2, 3), (3, 2)),
)


def shares_by_hand(query_MD: torch.Tensor, truth_MD: torch.Tensor, beta: float) -> list[float]:
    """softmax_p(s_p / beta), with s_p = beta log mean exp(pair / beta), as METHOD has them."""

    def pattern(rows: list[int], columns: list[int]) -> float:
        pairs = [float(query_MD[m] @ truth_MD[n]) for m in rows for n in columns]
        return beta * math.log(sum(math.exp(pair / beta) for pair in pairs) / len(pairs))

    fine = list(range(1, len(query_MD)))
    values = [pattern([0], [0]), pattern(fine, [0]), pattern([0], fine), pattern(fine, fine)]
    weights = [math.exp(value / beta) for value in values]
    return [100 * weight / sum(weights) for weight in weights]


def test_shares_are_the_mean_over_queries_with_their_truths(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    items_NMD = normalize(torch.randn(4, 3, 8, generator=generator, dtype=torch.float64), dim=-1)
    model = ColourModel()
    model.fusion = FusionConfig(beta=0.2)
    use = pattern_use(model, SET, items_NMD)
    assert use is not None
    pairs = [shares_by_hand(items_NMD[row], items_NMD[row + 2], 0.2) for row in (0, 1)]
    expected = [sum(values) / 2 for values in zip(*pairs, strict=True)]
    assert use.shares == pytest.approx(expected, rel=1e-6)
    assert sum(use.shares) == pytest.approx(100)
    assert use.num_pairs == 2

    file = ScoresFile(tmp_path / "scores.json", model="m", weights_sha256="w", settings={})
    file.add_patterns("S", use)
    file.add_patterns("T", None)
    assert read_results(file.path).patterns == {"S": use}


def test_one_vector_has_one_pattern_and_no_shares() -> None:
    assert pattern_use(ColourModel(), SET, torch.ones(4, 1, 2)) is None
