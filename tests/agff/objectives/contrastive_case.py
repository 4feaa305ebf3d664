"""The contrastive objective for the checks that every objective passes
(tests/agff/test_every_objective.py): all its treatments of negatives, and truncations."""

from __future__ import annotations

from agff.batch import Batch
from agff.objectives.contrastive import Contrastive

OBJECTIVE = Contrastive(
    temperature=0.2,
    amplification=2.0,
    width=0.2,
    bidirectional=True,
    false_negative_margin=0.02,
    num_hardest=3,
    hardness_weight=9.0,
    nested_dims=[5],
    nested_fine=[0],
    nested_weights=[0.5, 2.0],
)

AT_DEFAULT = {"renormalize": "what is trained; without it each row is scaled, and no more is gathered"}


def prepared(batch: Batch) -> Batch:
    """It needs nothing beside the items."""
    return batch
