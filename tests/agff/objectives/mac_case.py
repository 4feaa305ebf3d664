"""MAC for the checks that every objective passes (tests/agff/test_every_objective.py)."""

from __future__ import annotations

from agff.batch import Batch
from agff.objectives.mac import Mac

OBJECTIVE = Mac(
    temperature=0.5,
    coarse_to_fine=0.7,
    fine=1.3,
    both_directions=True,
    nested_dims=[8],
    nested_fine=[0],
    nested_weights=[0.5, 2.0],
)


def prepared(batch: Batch) -> Batch:
    """It needs nothing beside the items."""
    return batch
