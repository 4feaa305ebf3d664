"""Distillation for the checks that every objective passes (tests/agff/test_every_objective.py)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from agff.batch import Batch
from agff.objectives.distillation import Distillation

OBJECTIVE = Distillation(temperature=0.2)
AT_DEFAULT = {
    name: "what is trained; the other value takes the same collectives (test_distillation.py)"
    for name in ("direction", "diagonal")
}

TEACHER_DIM = 6


def prepared(batch: Batch) -> Batch:
    """The batch with a teacher's vectors: unit, equal for equal content on any rank. Each of its items is a
    row, so no rank is without one."""
    teacher = {
        "query_teacher": teacher_vectors(batch.query_ids_B),
        "target_teacher": teacher_vectors(batch.target_ids_B),
    }
    return dataclasses.replace(batch, pair_data={**batch.pair_data, **teacher})


def teacher_vectors(ids_B: Tensor) -> Tensor:
    rows = [
        torch.randn(TEACHER_DIM, generator=torch.Generator().manual_seed(number)) for number in ids_B.tolist()
    ]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)
