"""One optimizer step, as a straight line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agff.batch import Batch, ModelInputs
from agff.collectives import max_over_ranks
from agff.grad_cache import backward_through_chunks, encode_without_graph


class StepEngine(Protocol):
    """What a step needs of the engine (`agff.engine.Engine`)."""

    def encode(self, inputs: ModelInputs) -> Tensor:
        """(B, M, D) unit embeddings of one chunk."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients; the ranks exchange them on the last call of a step."""

    def step(self) -> bool:
        """Update the parameters; False when the gradient was not finite and nothing was changed."""


Objective = Callable[[Tensor, Tensor, Tensor, Batch], tuple[Tensor, Tensor, Tensor]]
"""(query_BMD, target_BMD, negative_NMD, batch) -> (loss, metrics, (B,) loss of each pair); a collective.

Only the loss has a gradient.
"""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did on this rank."""

    metrics: Tensor
    """The objective's metrics of the local rows, on the device."""
    pair_loss_B: Tensor
    """The loss of each local pair, on the device."""
    applied: bool
    """False when all ranks skipped the update together because the gradient was not finite."""


def train_step(engine: StepEngine, objective: Objective, batch: Batch) -> StepResult:
    """Encode, compare with all ranks, go back, update.

    Collective: every rank must call it with a batch of the same number of pairs. Chunks and explicit
    negatives may differ between ranks: the ranks agree on the largest numbers and fill up with blank ones.
    """
    num_chunks, num_negatives = max_over_ranks(
        [len(batch.chunks), batch.num_negatives], device=batch.row_of_item_R.device
    )
    batch = batch.padded_to(num_chunks=num_chunks, num_negatives=num_negatives)
    accumulate = _one_pass if batch.one_pass else _two_passes
    metrics, pair_loss_B = accumulate(engine, objective, batch)
    return StepResult(metrics=metrics, pair_loss_B=pair_loss_B, applied=engine.step())


def _one_pass(engine: StepEngine, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """Every chunk is small enough to keep its graph: plain forward and backward."""
    rows = torch.cat([engine.encode(chunk) for chunk in batch.chunks])
    loss, metrics, pair_loss_B = objective(*batch.split(rows), batch)
    engine.backward(loss, True)
    return metrics, pair_loss_B


def _two_passes(engine: StepEngine, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    embeddings, random_states = encode_without_graph(engine.encode, batch.chunks)
    leaves = [embedding.requires_grad_() for embedding in embeddings]
    loss, metrics, pair_loss_B = objective(*batch.split(torch.cat(leaves)), batch)
    gradients = torch.autograd.grad(loss, leaves)
    backward_through_chunks(engine.encode, batch.chunks, gradients, random_states, engine.backward)
    return metrics, pair_loss_B
