"""One optimizer step, as a straight line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agff.batch import Batch, Encoded, ModelInputs
from agff.collectives import max_over_ranks
from agff.grad_cache import (
    backward_through_chunks,
    encode_without_graph,
    gradients_at,
    gradients_of_chunks,
    sides_as_leaves,
    surrogate,
)
from agff.joined import groups_of, split_into
from agff.objectives.objective import Objective
from agff.similarity import FusionConfig


class StepEngine(Protocol):
    """What a step needs of the engine (`agff.engine.Engine`)."""

    def with_image_features(self, chunks: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
        """The chunks with the output of a frozen vision tower in place of their pixels."""

    first_pass_chunks: int
    """Chunks that pass 1, without a graph, encodes at once at most; 1 for a model that draws random
    numbers."""

    def encode(self, inputs: ModelInputs) -> Encoded:
        """What the model says of the rows of one chunk."""

    def encode_together(self, chunks: Sequence[ModelInputs]) -> list[Encoded]:
        """What the model says of each chunk, from one forward."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients; the ranks exchange them on the last call of a step."""

    def step(self) -> bool:
        """Update the parameters; False when the gradient was not finite and nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did on this rank. Its tensors are on the device."""

    loss: Tensor
    """Of the local rows; the ranks' mean is the loss of the global batch."""
    metrics: Mapping[str, Tensor]
    """The objective's, of the local rows."""
    pair_loss_B: Tensor
    """The loss of each local pair."""
    applied: bool
    """False when all ranks skipped the update together because the gradient was not finite."""
    not_finite: tuple[str, ...]
    """Names of the model's outputs that were not finite on this rank; looked for when nothing was applied."""


def train_step(engine: StepEngine, objective: Objective, fusion: FusionConfig, batch: Batch) -> StepResult:
    """Encode, compare with all ranks, go back, update.

    Collective: every rank must call it with a batch of the same number of pairs. Chunks and explicit
    negatives may differ between ranks: the ranks agree on the largest numbers and fill up with blank ones.
    """
    num_chunks, num_negatives = max_over_ranks(
        [len(batch.chunks), batch.num_negatives], device=batch.row_of_item_R.device
    )
    batch = batch.padded_to(num_chunks=num_chunks, num_negatives=num_negatives)
    first, *others = engine.with_image_features(batch.chunks)
    shapes = [(chunk["input_ids"].shape[0], chunk["input_ids"].shape[1]) for chunk in others]
    groups = groups_of(shapes, engine.first_pass_chunks)
    [num_groups] = max_over_ranks([len(groups)], device=batch.row_of_item_R.device)
    encoded, random_states = encode_without_graph(
        engine.encode_together, others, split_into(groups, num_groups)
    )
    kept = engine.encode(first)
    sizes = [len(chunk["embedding"]) for chunk in (kept, *encoded)]
    sides = sides_as_leaves(batch, [kept, *encoded])
    del encoded  # the sides are a copy
    is_finite = {name: _is_finite(name, sides) for name in kept}
    result = objective(*sides, batch, fusion)
    of_sides = gradients_at(result.loss, sides)
    del sides  # before the gradients are copied into the order of the rows
    first_gradients, *gradients = gradients_of_chunks(of_sides, batch, sizes)
    engine.backward(surrogate(kept, first_gradients), not others)
    backward_through_chunks(engine.encode, others, gradients, random_states, engine.backward)
    applied = engine.step()
    return StepResult(
        loss=result.loss.detach(),
        metrics=result.metrics,
        pair_loss_B=result.pair_loss_B,
        applied=applied,
        not_finite=() if applied else tuple(name for name, found in is_finite.items() if not found),
    )


def _is_finite(name: str, sides: Sequence[Encoded]) -> Tensor:
    """Whether that output is, on the device: only a step that changed nothing waits for it."""
    return torch.stack([side[name].isfinite().all() for side in sides]).all()
