"""FAM's alignment stage, MAC: InfoNCE of embeddings, of embeddings with tokens, and of tokens with tokens.

With unit tokens the mean cosine of x to the tokens v_1 ... v_L is x . mean_l(v_l). So one more vector an
item, the mean of its unit tokens, gives all terms exactly: no tensor of (B, C, L, L) cosines, and items of
any lengths meet. Source: FAM (AAAI-26, doi 10.1609/aaai.v40i32.39918); that the mean is enough, we derived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from agff.batch import NO_CONTENT, Batch, Encoded, ModelInputs
from agff.collectives import all_gather_rows, rank
from agff.errors import ConfigError
from agff.fused_loss import RowMeasures, fused_loss
from agff.losses import info_nce
from agff.negatives import negative_mask
from agff.objectives.nested import Nested
from agff.objectives.objective import Head, ObjectiveResult
from agff.similarity import FusionConfig, fused_similarity

SHORTEST = 1e-12
"""Length that a token is divided by at least, as torch's normalize does."""


def mac_loss(
    query_BD: Tensor,
    query_tokens_BD: Tensor,
    target_BD: Tensor,
    target_tokens_BD: Tensor,
    *,
    temperature: float,
    coarse_to_fine: float = 1.0,
    fine: float = 1.0,
    both_directions: bool = False,
) -> Tensor:
    """(B,) MAC of the pairs (query i, target i), whose candidates are the targets of all ranks:

        InfoNCE(query . target)
        + coarse_to_fine / 2 * [InfoNCE(query . target_tokens) + InfoNCE(query_tokens . target)]
        + fine * InfoNCE(query_tokens . target_tokens)

    The readable definition, with its (B, C) matrices; training runs `Mac`, the same in blocks of rows.

    query_BD, target_BD: unit vectors. The tokens: mean of an item's unit tokens, not normalised again.
    temperature: divides the cosines, > 0. both_directions: the mean of this and the same from target to
    query. float32 or better inside. Collective, but for a world of one: every rank must call it, with the
    same B. Raises ValueError for shapes that differ and for a wrong temperature.
    """
    sides = (query_BD, query_tokens_BD, target_BD, target_tokens_BD)
    if query_BD.ndim != 2 or any(side.shape != query_BD.shape for side in sides):
        raise ValueError(f"expected four of one shape (B, D), got {[tuple(side.shape) for side in sides]}")
    own_B = torch.arange(len(query_BD), device=query_BD.device) + rank() * len(query_BD)

    def term(row_BD: Tensor, candidate_BD: Tensor) -> Tensor:
        similarity_BC = fused_similarity(row_BD[:, None], all_gather_rows(candidate_BD)[:, None], beta=1.0)
        return info_nce(similarity_BC, own_B, temperature=temperature)

    def direction(row: Tensor, row_tokens: Tensor, candidate: Tensor, candidate_tokens: Tensor) -> Tensor:
        between_B = term(row, candidate_tokens) + term(row_tokens, candidate)
        return (
            term(row, candidate) + coarse_to_fine / 2 * between_B + fine * term(row_tokens, candidate_tokens)
        )

    loss_B = direction(*sides)
    return (loss_B + direction(*sides[2:], *sides[:2])) / 2 if both_directions else loss_B


class TokenMean(Head):
    """Gives "tokens" (B, D), the mean of the unit content tokens of the last layer, not normalised again.

    Content is the image's tokens where an item has an image, else all that comes before the prompts: not the
    instruction beside an image, not the blank image behind the prompts of a text, no padding. An item without
    any has zeros. No parameters.
    """

    def __init__(self, image_token_id: int) -> None:
        super().__init__()
        self.image_token_id = image_token_id

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        """See Head."""
        last_BTH = states[-1]
        is_content_BT = self._content(inputs)
        dtype = torch.promote_types(last_BTH.dtype, torch.float32)
        # not by a product with zeros: what is in the padding is nobody's business
        content_BTH = last_BTH.to(dtype).masked_fill(~is_content_BT[..., None], 0)
        # a weighted sum keeps one (B, T, H) for the backward pass, the mean of unit tokens three
        length_BT = torch.linalg.vector_norm(content_BTH, dim=-1).clamp(min=SHORTEST)
        weight_BT = 1 / (length_BT * is_content_BT.sum(dim=1, keepdim=True).clamp(min=1))
        return {"tokens": torch.einsum("bt,bth->bh", weight_BT, content_BTH)}

    def _content(self, inputs: ModelInputs) -> Tensor:
        """(B, T) True at an item's content."""
        before_BT = tokens_before_prompts(inputs)
        image_BT = before_BT & (inputs["input_ids"] == self.image_token_id)
        return torch.where(image_BT.any(dim=1, keepdim=True), image_BT, before_BT)


def tokens_before_prompts(inputs: ModelInputs) -> Tensor:
    """(B, T) True at what an item consists of: text and image, not prompts, nor what is behind them."""
    places_T = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    return places_T < inputs["prompt_start_B"][:, None]


_Part: TypeAlias = Literal["embeddings", "tokens"]
"""The first term of MAC, or its three terms with tokens."""


@dataclass(frozen=True, kw_only=True)
class Mac(Nested):
    """FAM's alignment of images and captions by embeddings and tokens (MAC).

    Truncations (ours) are of the embeddings in the first term alone: the mean of unit tokens has no prefix
    that is the mean of unit prefixes, so the terms with tokens are computed once, with whole vectors.
    """

    temperature: float = 0.02
    """Divides the similarities; FAM's value."""
    coarse_to_fine: float = 1.0
    """Weight of the mean of both terms between embeddings and tokens; the paper's. Its code: 2."""
    fine: float = 1.0
    """Weight of the term between tokens and tokens; the paper's full form. Its released script: 0."""
    both_directions: bool = False
    """Also score each target against all queries, and average the two losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"loss.temperature={self.temperature} must be > 0")
        for name in ("coarse_to_fine", "fine"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name}={getattr(self, name)} must be >= 0; 0 leaves the term out")

    def build_head(self, backbone_config: Any) -> Head:
        """See Objective."""
        return TokenMean(backbone_config.image_token_id)

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        """See Objective.

        Candidates as in Contrastive. With fine vectors beside the global one the first term is InfoNCE on the
        fused similarity (ours; FAM has one vector); those with tokens take the global one.
        """
        first = self.nested_result(
            lambda q, t, n: self._part("embeddings", q, t, n, batch, fusion), query, target, negative
        )
        others = self._part("tokens", query, target, negative, batch, fusion)
        return ObjectiveResult(
            loss=first.loss + others.loss,
            metrics={**first.metrics, **others.metrics},
            pair_loss_B=first.pair_loss_B + others.pair_loss_B,
        )

    def _part(
        self,
        part: _Part,
        query: Encoded,
        target: Encoded,
        negative: Encoded,
        batch: Batch,
        fusion: FusionConfig,
    ) -> ObjectiveResult:
        no_partner_N = torch.full_like(batch.negative_ids_N, NO_CONTENT)
        loss, pair_loss_B, terms = _one_direction(
            part,
            query,
            {name: torch.cat([target[name], negative[name]]) for name in ("embedding", "tokens")},
            batch.query_ids_B,
            candidate_ids=torch.cat([batch.target_ids_B, batch.negative_ids_N]),
            partner_ids=torch.cat([batch.query_ids_B, no_partner_N]),
            config=self,
            fusion=fusion,
        )
        if self.both_directions:
            backward_loss, backward_B, _ = _one_direction(
                part,
                target,
                query,
                batch.target_ids_B,
                candidate_ids=batch.query_ids_B,
                partner_ids=batch.target_ids_B,
                config=self,
                fusion=fusion,
            )
            loss, pair_loss_B = (loss + backward_loss) / 2, (pair_loss_B + backward_B) / 2
        metrics = {f"mac/{name}": rows.loss_B.mean() for name, rows in terms.items()}
        if part == "embeddings":
            metrics |= _similarities(terms["coarse"])
        return ObjectiveResult(loss=loss, metrics=metrics, pair_loss_B=pair_loss_B)


def _similarities(coarse: RowMeasures) -> dict[str, Tensor]:
    """Of embeddings, for the log."""
    has_negatives_B = (coarse.num_negatives_B > 0).to(coarse.positive_B.dtype)
    num_compared = has_negatives_B.sum().clamp(min=1)
    return {
        "similarity/positive": coarse.positive_B.mean(),
        "similarity/hardest_negative": (coarse.hardest_B * has_negatives_B).sum() / num_compared,
        "batch_accuracy": ((coarse.positive_B > coarse.hardest_B) * has_negatives_B).sum() / num_compared,
    }


def _one_direction(
    part: _Part,
    row: Encoded,
    candidate: Encoded,
    row_ids_B: Tensor,
    *,
    candidate_ids: Tensor,
    partner_ids: Tensor,
    config: Mac,
    fusion: FusionConfig,
) -> tuple[Tensor, Tensor, dict[str, RowMeasures]]:
    """(mean loss, loss of each row, measures of each term) of the rows. candidate: this rank's, of which the
    first B are the rows' positives, in order."""
    num_rows, device = len(row["tokens"]), row["tokens"].device
    ids_C, partner_ids_C = all_gather_rows(torch.stack([candidate_ids, partner_ids], dim=1)).unbind(dim=1)
    loss, measures = torch.zeros((), device=device), {}
    terms = _terms(part, row, candidate, config)
    for name, (weight, row_vectors, candidate_vectors) in terms.items():
        term, measures[name] = fused_loss(
            row_vectors,
            candidate_vectors,
            torch.arange(num_rows, device=device) + rank() * len(candidate["tokens"]),
            torch.full((num_rows,), weight / num_rows, dtype=torch.float64, device=device),
            negatives_of=lambda rows: negative_mask(
                row_ids_B[rows], candidate_ids[:num_rows][rows], ids_C, partner_ids_C
            ),
            beta=fusion.beta,
            temperature=config.temperature,
            amplification=0,
            width=1,
            renormalize=False,
        )
        loss = loss + term
    row_loss_B = torch.stack([weight * measures[name].loss_B for name, (weight, *_) in terms.items()])
    return loss, row_loss_B.sum(dim=0), measures


def _terms(
    part: _Part, row: Encoded, candidate: Encoded, config: Mac
) -> dict[str, tuple[float, Tensor, Tensor]]:
    """{name: (weight, this rank's rows, candidates of all ranks)} of the part's terms."""
    if part == "embeddings":
        return {"coarse": (1.0, row["embedding"], all_gather_rows(candidate["embedding"]))}
    row_tokens_B1D, between = row["tokens"][:, None], config.coarse_to_fine / 2
    candidate_C1D = all_gather_rows(candidate["embedding"][:, :1])
    candidate_tokens_C1D = all_gather_rows(candidate["tokens"])[:, None]
    return {
        "to_tokens": (between, row["embedding"][:, :1], candidate_tokens_C1D),
        "from_tokens": (between, row_tokens_B1D, candidate_C1D),
        "fine": (config.fine, row_tokens_B1D, candidate_tokens_C1D),
    }
