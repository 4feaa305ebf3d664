"""all-MiniLM-L6-v2, where the quickstart has fetched it: the numbers of sentence-transformers 6.2 itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agff.batch import Item
from launcher.embedding.sentence_model import SentenceModel
from launcher.quickstart import DEFAULT_OUT
from tests.launcher.runs import REPOSITORY

TEACHER = REPOSITORY / DEFAULT_OUT / "teacher"
TEXTS = ["a red heart", "a heart in red", "two dogs on a sofa", "  Find a photo of ÉCLAIR\n"]
COSINES = [
    [1.0, 0.96048, 0.03021, 0.14631],
    [0.96048, 1.0, 0.00051, 0.15507],
    [0.03021, 0.00051, 1.0, 0.03313],
    [0.14631, 0.15507, 0.03313, 1.0],
]
FIRST_VALUES = [
    [-0.01482, 0.02769, -0.05527],
    [-0.00776, 0.03619, -0.06471],
    [0.0744, -0.11109, -0.00269],
    [-0.01205, 0.11804, -0.01214],
]


@pytest.mark.skipif(
    not (TEACHER / "model.safetensors").exists(),
    reason="no teacher here: python launcher/quickstart_data.py --family fetches it",
)
def test_the_real_teacher_has_the_vectors_that_sentence_transformers_gives_it() -> None:
    vectors = SentenceModel(TEACHER, torch.device("cpu")).encode(
        [Item(text=text) for text in TEXTS], batch_size=3
    )
    np.testing.assert_allclose(vectors @ vectors.T, COSINES, atol=2e-5)
    np.testing.assert_allclose(vectors[:, :3], FIRST_VALUES, atol=2e-5)
