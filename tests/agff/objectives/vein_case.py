"""VEIN for the checks that every objective passes (tests/agff/test_every_objective.py): without dropout, and
with masks that do not depend on the order in which items are encoded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agff.batch import Batch, ModelInputs
from agff.objectives.mac import tokens_before_prompts
from agff.objectives.objective import Head
from agff.objectives.vein import MaskedReconstruction, Vein, VisualSources


class FixedMasks(MaskedReconstruction):
    """Masks an image's tokens in an order that follows from their places in it."""

    def draw(self, is_image_BT: Tensor) -> Tensor:
        place_BT = is_image_BT.cumsum(dim=1)
        return (place_BT * 7 % 11).to(torch.float64) + place_BT * 1e-3


class SeveralTokens(FixedMasks):
    """Counts the text beside an image as further tokens of it: the tiny model's images have one token, and so
    no memory to attend to."""

    def _image_tokens(self, inputs: ModelInputs) -> Tensor:
        has_image_B1 = super()._image_tokens(inputs).any(dim=1, keepdim=True)
        return has_image_B1 & tokens_before_prompts(inputs)


@dataclass(frozen=True, kw_only=True)
class FixedVein(Vein):
    def build_head(self, backbone_config: Any) -> Head:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same decoder for every model that is compared
            head = super().build_head(backbone_config)
        assert isinstance(head, MaskedReconstruction)
        head.__class__ = SeveralTokens
        return head


OBJECTIVE = FixedVein(
    temperature=0.5,
    amplification=2.0,
    reconstruction_weight=3.0,
    layers=2,
    mask_ratio=0.4,
    decoder_dropout=0.0,
    visual_sources=VisualSources(queries=["rows"]),
)
RANDOM = Vein(
    **{each.name: getattr(OBJECTIVE, each.name) for each in dataclasses.fields(OBJECTIVE)}
    | {"decoder_dropout": 0.3}
)
"""As it trains: masks and dropout are drawn."""
OF_ELIGIBLE = "vein/reconstruction"
WITHOUT_EFFECT = {
    f"head.decoder.{attention}.in_proj_bias": slice(16, 32) for attention in ("self_attn", "multihead_attn")
}
"""The bias of the keys (hidden size 16) shifts all logits of a query alike, which softmax does not see. Its
gradient is rounding noise, of which Adam makes full steps, so it ends anywhere; those of queries and values
do not."""


def prepared(batch: Batch) -> Batch:
    """The batch with its purely visual items: some queries of the first half of the global batch
    (tests/agff/tiny.py: query_id), so on two ranks none on the second."""
    visual_B = ((batch.query_ids_B < 4) & (batch.query_ids_B != 1)).to(torch.float32)
    pair_data = {"query_is_visual": visual_B, "target_is_visual": torch.ones_like(visual_B)}
    return dataclasses.replace(batch, pair_data=pair_data)
