"""An objective with a head that makes one output of each kind: a vector of each row, a loss of each row, and
a learned temperature."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agff.batch import Batch, Encoded, ModelInputs
from agff.collectives import all_gather_rows, rank, weighted_mean_over_all_rows
from agff.losses import info_nce
from agff.objectives.objective import Head, Objective, ObjectiveResult
from agff.similarity import FusionConfig

HIDDEN = 16
"""Of tests/agff/tiny.py."""


class ThreeKindsHead(Head):
    num_states = 2

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HIDDEN, 6, bias=False)
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        before_BTH, last_BTH = states
        rows_B = torch.arange(len(before_BTH))
        first_BH = before_BTH[rows_B, inputs["prompt_start_B"]]
        vector_BD = nn.functional.normalize(self.project(first_BH), dim=-1)
        return {
            "vector": vector_BD,
            "row_loss": 1 - (vector_BD * last_BTH[rows_B, inputs["prompt_start_B"], :6].tanh()).sum(dim=1),
            "temperature": self.log_temperature.exp().expand(len(rows_B)),
        }


@dataclass(frozen=True, kw_only=True)
class ThreeKinds(Objective):
    def build_head(self, backbone_config: Any) -> Head:
        return ThreeKindsHead()

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        own = torch.arange(batch.num_pairs) + rank() * batch.num_pairs
        pair_loss_B: Any = 0.0
        for name in ("vector", "embedding"):
            candidate_CD = all_gather_rows(target[name].flatten(1))
            similarity_BC = query[name].flatten(1) @ candidate_CD.T / query["temperature"][:, None]
            pair_loss_B = pair_loss_B + info_nce(similarity_BC, own, temperature=0.5)
        row_loss = weighted_mean_over_all_rows(query["row_loss"], batch.pair_data["eligible"])
        return ObjectiveResult(
            loss=pair_loss_B.mean() + row_loss,
            metrics={"row_loss": row_loss.detach()},
            pair_loss_B=pair_loss_B.detach(),
        )


def with_eligible(batch: Batch) -> Batch:
    """The batch with weights of the rows that have a loss of their own: some of the first half of the global
    batch (tests/agff/tiny.py: query_id), so on two ranks none on the second."""
    eligible_B = ((batch.query_ids_B < 4) & (batch.query_ids_B != 1)).to(torch.float32)
    return dataclasses.replace(batch, pair_data={"eligible": eligible_B})
