"""MM-GEM: one model that embeds and generates (arXiv 2405.19333; all equations are our definition, since the
paper has none)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agff.batch import NO_CONTENT, Batch, Encoded, Item
from agff.collectives import all_gather_rows, rank, weighted_mean_over_all_rows
from agff.errors import ConfigError
from agff.losses import info_nce
from agff.negatives import negative_mask
from agff.objectives.mm_gem_head import HIGHEST, LOWEST, MmGemHead
from agff.objectives.nested import Nested
from agff.objectives.objective import Head, ObjectiveResult
from agff.regions import ImageCells
from agff.similarity import FusionConfig


@dataclass(frozen=True, kw_only=True)
class MmGem(Nested):
    """L = embedding_weight L_Emb + generation_weight L_Gen (README, The family).

    L_Emb: symmetric InfoNCE of images or regions and texts with a learned temperature. L_Gen: next-token
    cross entropy of what the text says, given the image or region; the sum over the caption tokens of the
    global batch divided by their number."""

    temperature: float = 0.07
    """Divides cosine similarities in the beginning; then it is learned, between 0.01 and 1."""
    embedding_weight: float = 1.0
    """Of L_Emb."""
    generation_weight: float = 1.0
    """Of L_Gen."""
    grid: int = 7
    """Cells a side, at most, that an image is pooled to: what the language model reads of it."""
    region_grid: int = 3
    """Cells a side that a region's caption is made of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nested_fine:
            raise ConfigError(
                f"loss.nested_fine={self.nested_fine}: an item has one vector with mm_gem; shorten it by "
                "loss.nested_dims"
            )
        if not LOWEST < self.temperature < HIGHEST:
            raise ConfigError(
                f"loss.temperature={self.temperature} must be above {LOWEST} and below {HIGHEST}, between "
                "which it is learned"
            )
        for name in ("embedding_weight", "generation_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name}={getattr(self, name)} must be >= 0")
        if not (self.embedding_weight or self.generation_weight):
            raise ConfigError("loss.embedding_weight and loss.generation_weight must not both be 0")
        for name in ("grid", "region_grid"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loss.{name}={getattr(self, name)} must be >= 1")

    @property
    def image_cells(self) -> ImageCells:
        """See Objective."""
        return ImageCells(side=self.grid, region_side=self.region_grid)

    def items_of_pair(self, source: str, query: Item, target: Item) -> tuple[Item, Item]:
        """An image, or region, beside a text learns to say it, without the part that is instruction where the
        source keeps that apart; of MMEB's own queries without an image the instruction is said too. Raises
        DataError where nothing is left to say."""
        return _with_caption(query, target), _with_caption(target, query)

    def build_head(self, backbone_config: Any) -> Head:
        """Raises ConfigError for a backbone whose language model reads more of an image than its tokens."""
        if getattr(backbone_config.vision_config, "deepstack_visual_indexes", None):
            raise ConfigError(
                f"mm_gem cannot train a backbone of type {backbone_config.model_type}: several of its layers "
                "read deep-stack levels of every image token, and of pooled cells there are none; use "
                "qwen2_vl, qwen2_5_vl or llava_onevision"
            )
        text = backbone_config.get_text_config()
        return MmGemHead(text.hidden_size, text.vocab_size, self.image_cells, temperature=self.temperature)

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        """See Objective. Explicit negatives are candidates of the queries."""
        embedding = self.nested_result(
            lambda q, t, n: _embedding_result(q, t, n, batch), query, target, negative
        )
        nll, tokens = (  # not of the negatives: they have no captions, and what pads them is any row
            torch.cat([query[name], target[name]]) for name in ("caption_nll", "caption_tokens")
        )
        generation = weighted_mean_over_all_rows(nll / tokens.clamp(min=1), tokens)
        loss = self.embedding_weight * embedding.loss + self.generation_weight * generation
        own_nll_B = query["caption_nll"] + target["caption_nll"]
        own_tokens_B = (query["caption_tokens"] + target["caption_tokens"]).clamp(min=1)
        metrics: Mapping[str, Tensor] = {
            "loss/embedding": embedding.loss,
            "loss/generation": generation,
            "temperature": query["temperature"].mean(),
            **embedding.metrics,
        }
        return ObjectiveResult(
            loss=loss,
            metrics={name: value.detach() for name, value in metrics.items()},
            pair_loss_B=(
                self.embedding_weight * embedding.pair_loss_B
                + self.generation_weight * own_nll_B / own_tokens_B
            ).detach(),
        )


def _with_caption(item: Item, partner: Item) -> Item:
    if item.image is None or partner.image is not None:
        return item
    caption = partner.text.replace(partner.instruction, "", 1).strip()
    if not caption:
        raise partner.error("is empty, and the image beside it is to learn to say it")
    return replace(item, caption=caption)


def _embedding_result(query: Encoded, target: Encoded, negative: Encoded, batch: Batch) -> ObjectiveResult:
    """L_Emb, both directions."""
    candidates = torch.cat([target["embedding"], negative["embedding"]])
    candidate_ids = torch.cat([batch.target_ids_B, batch.negative_ids_N])
    no_partner_N = torch.full_like(batch.negative_ids_N, NO_CONTENT)
    forward_B, measures = _one_direction(
        query, candidates, batch.query_ids_B, candidate_ids, torch.cat([batch.query_ids_B, no_partner_N])
    )
    backward_B, _ = _one_direction(
        target, query["embedding"], batch.target_ids_B, batch.query_ids_B, batch.target_ids_B
    )
    loss_B = (forward_B + backward_B) / 2
    return ObjectiveResult(loss=loss_B.mean(), metrics=measures, pair_loss_B=loss_B.detach())


def _one_direction(
    row: Encoded, candidates: Tensor, row_ids_B: Tensor, candidate_ids: Tensor, partner_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """((B,) losses, measures for the log).

    candidates: this rank's, of which the first B are the rows' positives, in order."""
    row_BD = row["embedding"][:, 0]
    num_rows = len(row_BD)
    ids_C, partner_ids_C = all_gather_rows(torch.stack([candidate_ids, partner_ids], dim=1)).unbind(dim=1)
    cosine_BC = row_BD @ all_gather_rows(candidates)[:, 0].T
    own_B = torch.arange(num_rows, device=row_BD.device) + rank() * len(candidates)
    mask_BC = negative_mask(row_ids_B, candidate_ids[:num_rows], ids_C, partner_ids_C)
    loss_B = info_nce(
        cosine_BC / row["temperature"][:, None], own_B, temperature=1.0, negative_mask_BC=mask_BC
    )
    with torch.no_grad():
        positive_B = cosine_BC.gather(1, own_B[:, None])[:, 0]
        is_compared_B = mask_BC.any(dim=1)
        is_best_B = positive_B > cosine_BC.masked_fill(~mask_BC, -torch.inf).amax(dim=1)
        measures = {
            "similarity/positive": positive_B.mean(),
            "batch_accuracy": (is_best_B & is_compared_B).sum() / is_compared_B.sum().clamp(min=1),
        }
    return loss_B, measures
