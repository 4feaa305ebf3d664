"""What confirms the quickstart's beta gives options that exist and reads the scores that are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.command_line import parse_train_arguments
from tests.benchmarks.ablation.quickstart_beta import BETAS, commands, markdown, scores_of

VALUES = {
    "mmeb": {"sets": [{"name": "Emoji_t2i", "score": 10.0}]},
    "captions": [
        {
            "name": "Sheets",
            "scores": [
                {"direction": "text to image", "similarity": "fused", "recall_at_1": 30.0},
                {"direction": "image to text", "similarity": "fused", "recall_at_1": 99.0},
                {"direction": "text to image", "similarity": "global", "recall_at_1": 20.0},
            ],
        }
    ],
}


@pytest.mark.parametrize("beta", BETAS)
def test_the_training_command_sets_beta_seed_and_folder(beta: float) -> None:
    train, score = commands(Path("runs/one"), Path("one.partial"), beta=beta, seed=2)
    config = parse_train_arguments(train[2:]).config
    assert (config.fusion.beta, config.seed, config.run_dir) == (beta, 2, "runs/one")
    assert score[2] == "runs/one"
    assert score[-1] == "one.partial"


def test_scores_are_those_of_naming_one_by_either_similarity() -> None:
    assert scores_of(VALUES) == {"Emoji_t2i": 10.0, "Sheets, fused": 30.0, "Sheets, global": 20.0}


def test_the_table_pairs_seeds() -> None:
    """Differences 1 and 3: mean 2, t(0.975, 1) = 12.706, standard error 1."""
    scores = {BETAS[0]: [{"a": 1.0}, {"a": 2.0}], BETAS[1]: [{"a": 2.0}, {"a": 5.0}]}
    assert "| a | 1.5 | 3.5 | +2.0 ± 12.7 |" in markdown(scores, origin="today")
