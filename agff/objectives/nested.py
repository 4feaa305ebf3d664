"""Objectives that also train truncations (Matryoshka, arXiv 2205.13147): one line of a contrastive one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from agff.batch import Encoded
from agff.errors import ConfigError
from agff.nested import WHOLE_ONLY, Truncation, Truncations, check_increasing
from agff.objectives.objective import Objective, ObjectiveResult


@dataclass(frozen=True, kw_only=True)
class Nested(Objective):
    """An objective that also trains truncations: its loss is the mean over them, by weight.

    It calls `nested_result` with the loss of one truncation. That loss and its gathers are run once for each,
    (dims + 1) x (fine + 1) in all, and the gradients of all of them wait for the backward.
    """

    nested_dims: list[int] = field(default_factory=list)
    """Matryoshka: the first numbers of each vector that also serve alone, re-normalised; increasing."""
    nested_fine: list[int] = field(default_factory=list)
    """Matryoshka: how many of the first fine vectors also serve alone, at each length; 0: the global one."""
    nested_weights: list[float] = field(default_factory=list)
    """Weight of each of nested_dims, then of nested_fine; their product where both are cut, and 1 for whole
    items. []: all 1."""

    def __post_init__(self) -> None:
        check_increasing("loss.nested_dims", self.nested_dims, least=1)
        check_increasing("loss.nested_fine", self.nested_fine, least=0)
        wanted = len(self.nested_dims) + len(self.nested_fine)
        if self.nested_weights and len(self.nested_weights) != wanted:
            raise ConfigError(
                f"loss.nested_weights={self.nested_weights} must have {wanted} numbers: one for each of "
                f"nested_dims={self.nested_dims}, then of nested_fine={self.nested_fine}"
            )
        if any(weight <= 0 for weight in self.nested_weights):
            raise ConfigError(f"loss.nested_weights={self.nested_weights} must be > 0")

    @property
    def truncations(self) -> Truncations:
        """What it trains beside whole items."""
        return Truncations(dims=self.nested_dims, fine=self.nested_fine)

    def check_sizes(self, *, global_batch_size: int, num_fine: int) -> None:
        """See Objective."""
        if self.nested_fine and self.nested_fine[-1] > num_fine:
            raise ConfigError(
                f"loss.nested_fine={self.nested_fine} must be <= prompts.num_fine={num_fine}: a prefix is no "
                "longer than the whole"
            )

    def check_backbone(self, backbone_config: Any) -> None:
        """See Objective."""
        width = self.vector_width(backbone_config)
        if self.nested_dims and self.nested_dims[-1] > width:
            raise ConfigError(
                f"loss.nested_dims={self.nested_dims} must be <= {width}, the numbers of a vector: a prefix "
                "is no longer than the whole"
            )

    def vector_width(self, backbone_config: Any) -> int:
        """D of the vectors it compares: the backbone's width, where no head makes others."""
        return backbone_config.get_text_config().hidden_size

    def nested_result(
        self,
        result_of: Callable[[Encoded, Encoded, Encoded], ObjectiveResult],
        query: Encoded,
        target: Encoded,
        negative: Encoded,
    ) -> ObjectiveResult:
        """The weighted mean of `result_of(query, target, negative)` over all truncations of "embedding";
        metrics are those of whole items. Collective if `result_of` is."""
        _, num_vectors, width = query["embedding"].shape
        truncations = self.truncations.all(width=width, num_fine=num_vectors - 1)
        if not truncations:
            return result_of(query, target, negative)
        results = [
            result_of(*(truncation.of_encoded(side) for side in (query, target, negative)))
            for truncation in truncations
        ]
        weights = [self._weight(truncation) for truncation in truncations]
        shares = [weight / sum(weights) for weight in weights]
        return replace(
            results[0],
            loss=_weighted_sum(shares, [result.loss for result in results]),
            pair_loss_B=_weighted_sum(shares, [result.pair_loss_B for result in results]),
        )

    def _weight(self, truncation: Truncation) -> float:
        weights = self.nested_weights or [1.0] * (len(self.nested_dims) + len(self.nested_fine))
        of_dim = dict(zip(self.nested_dims, weights, strict=False))
        of_fine = dict(zip(self.nested_fine, weights[len(self.nested_dims) :], strict=True))
        return of_dim.get(truncation.dim, 1.0) * of_fine.get(truncation.num_fine, 1.0)


def truncations_of(objective: Objective) -> Truncations:
    """What an objective trains beside whole items."""
    return objective.truncations if isinstance(objective, Nested) else WHOLE_ONLY


def _weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(dim=0)
