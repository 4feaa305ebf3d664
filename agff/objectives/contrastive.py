"""AGFF-Embed's objective: fused similarity, global in-batch negatives, EGA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agff.batch import NO_CONTENT, Batch, Encoded
from agff.collectives import all_gather_rows, rank, world_size
from agff.errors import ConfigError
from agff.fused_loss import fused_loss
from agff.negatives import negative_mask
from agff.objectives.nested import Nested
from agff.objectives.objective import ObjectiveResult
from agff.row_loss import RowMeasures
from agff.similarity import PATTERNS, FusionConfig, pattern_shares


@dataclass(frozen=True, kw_only=True)
class Contrastive(Nested):
    """InfoNCE on the fused similarity, EGA (README, Method), and other treatments of negatives. They combine:
    content ids first, then the margin, then the hardest, then weights on logits, then EGA."""

    temperature: float = 0.02
    """Divides the fused similarity; 0.01 to 0.1 in practice."""
    amplification: float = 1.0
    """EGA: the hardest negative's gradient weighs 1 + amplification; 0 is plain InfoNCE."""
    width: float = 0.1
    """EGA: distance to the positive's similarity at which the extra weight has fallen to 1/e."""
    renormalize: bool = True
    """EGA: amplified probabilities of a row sum to 1 again; false: each gradient is times its weight."""
    bidirectional: bool = False
    """Also score each target against all queries, and average the two losses."""
    false_negative_margin: float | None = None
    """Candidates more than this above the positive are no negatives (UniME: 0.1); with fine vectors in units
    of the fused similarity, whose value for equal items is below 1. null: no filter."""
    num_hardest: int | None = None
    """Only this many negatives of a row count, its most similar (UniME: 8). null: all."""
    hardness_weight: float = 0.0
    """LLaVE: a negative counts exp(weight * similarity) times, without gradient; 9 there. 0: once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "width"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"loss.{name}={getattr(self, name)} must be > 0")
        if self.amplification < 0:
            raise ConfigError(f"loss.amplification={self.amplification} must be >= 0; 0 is plain InfoNCE")
        if self.hardness_weight < 0:
            raise ConfigError(f"loss.hardness_weight={self.hardness_weight} must be >= 0; 0 weighs nothing")
        if self.num_hardest is not None and self.num_hardest < 1:
            raise ConfigError(f"loss.num_hardest={self.num_hardest} must be >= 1; null keeps all negatives")

    def check_sizes(self, *, global_batch_size: int, num_fine: int) -> None:
        """See Objective."""
        super().check_sizes(global_batch_size=global_batch_size, num_fine=num_fine)
        if self.num_hardest is not None and self.num_hardest >= global_batch_size:
            raise ConfigError(
                f"loss.num_hardest={self.num_hardest} must be below global_batch_size={global_batch_size}: "
                f"a row has {global_batch_size - 1} other pairs to choose from; null keeps all negatives"
            )

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        """See Objective."""
        return self.nested_result(
            lambda q, t, n: self._of_one_truncation(q, t, n, batch, fusion), query, target, negative
        )

    def _of_one_truncation(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        """Candidates of a query are the targets and the explicit negatives of all ranks; of a target
        (bidirectional), all queries. The gradient that reaches the embeddings is the sum over ranks of the
        gradients of their local means (see `all_gather_rows`).
        """
        query_BMD, target_BMD, negative_NMD = (side["embedding"] for side in (query, target, negative))
        no_partner_N = torch.full_like(batch.negative_ids_N, NO_CONTENT)
        loss, rows = _one_direction(
            query_BMD,
            torch.cat([target_BMD, negative_NMD]) if len(negative_NMD) else target_BMD,
            batch.query_ids_B,
            candidate_ids=torch.cat([batch.target_ids_B, batch.negative_ids_N]),
            partner_ids=torch.cat([batch.query_ids_B, no_partner_N]),
            config=self,
            fusion=fusion,
        )
        pair_loss_B = rows.loss_B
        if self.bidirectional:
            backward_loss, backward_rows = _one_direction(
                target_BMD,
                query_BMD,
                batch.target_ids_B,
                candidate_ids=batch.query_ids_B,
                partner_ids=batch.target_ids_B,
                config=self,
                fusion=fusion,
            )
            loss, pair_loss_B = (loss + backward_loss) / 2, (pair_loss_B + backward_rows.loss_B) / 2
        is_compared_B = (rows.num_candidates_B > 0).to(rows.positive_B.dtype)
        num_compared = is_compared_B.sum().clamp(min=1)
        shares = pattern_shares(query_BMD, target_BMD, beta=fusion.beta)
        metrics = {
            "similarity/positive": rows.positive_B.mean(),
            "similarity/hardest_negative": (rows.hardest_B * is_compared_B).sum() / num_compared,
            "batch_accuracy": ((rows.positive_B > rows.hardest_B) * is_compared_B).sum() / num_compared,
            # the log takes the ranks' mean: of the whole global batch, query to target
            "rows_without_negative": (rows.num_negatives_B == 0).sum() * world_size(),
            "negatives_per_row": rows.num_negatives_B.mean(),
            "ega/mean_weight": rows.weight_sum_B.sum() / rows.num_negatives_B.sum().clamp(min=1),
            **{f"pattern_share/{name}": share for name, share in zip(PATTERNS, shares, strict=True)},
        }
        return ObjectiveResult(loss=loss, metrics=metrics, pair_loss_B=pair_loss_B)


def _one_direction(
    row_BMD: Tensor,
    candidates: Tensor,
    row_ids_B: Tensor,
    *,
    candidate_ids: Tensor,
    partner_ids: Tensor,
    config: Contrastive,
    fusion: FusionConfig,
) -> tuple[Tensor, RowMeasures]:
    """(mean loss, measures) of the rows. candidates: this rank's, of which the first B are the rows'
    positives, in order."""
    num_rows = row_BMD.shape[0]
    ids_C, partner_ids_C = all_gather_rows(torch.stack([candidate_ids, partner_ids], dim=1)).unbind(dim=1)
    return fused_loss(
        row_BMD,
        all_gather_rows(candidates),
        torch.arange(num_rows, device=row_BMD.device) + rank() * candidates.shape[0],
        torch.full((num_rows,), 1 / num_rows, dtype=torch.float64, device=row_BMD.device),
        negatives_of=lambda rows: negative_mask(
            row_ids_B[rows], candidate_ids[:num_rows][rows], ids_C, partner_ids_C
        ),
        beta=fusion.beta,
        temperature=config.temperature,
        amplification=config.amplification,
        width=config.width,
        renormalize=config.renormalize,
        margin=config.false_negative_margin,
        num_hardest=config.num_hardest,
        hardness_weight=config.hardness_weight,
    )
