"""One optimizer step, as a straight line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agff.batch import Batch, ModelInputs
from agff.grad_cache import backward_through_chunks, encode_without_graph


class StepEngine(Protocol):
    """What a step needs of the engine (`agff.engine.Engine`)."""

    def encode(self, inputs: ModelInputs) -> Tensor:
        """(B, M, D) unit embeddings of one chunk."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients; the ranks exchange them on the last call of a step."""

    def step(self) -> bool:
        """Update the parameters; False when the gradient was not finite and nothing was changed."""


Objective = Callable[[Tensor, Tensor, Batch], tuple[Tensor, Tensor]]
"""(query_BMD, target_BMD, batch) -> (loss, metrics without gradient); a collective."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did on this rank."""

    metrics: Tensor
    """The objective's metrics of the local rows, on the device."""
    applied: bool
    """False when all ranks skipped the update together because the gradient was not finite."""


def train_step(engine: StepEngine, objective: Objective, batch: Batch) -> StepResult:
    """Encode, compare with all ranks, go back, update.

    Collective: every rank must call it with a batch of the same number of chunks and rows.
    """
    accumulate = _one_pass if len(batch.query_chunks) == 1 else _two_passes
    metrics = accumulate(engine, objective, batch)
    return StepResult(metrics=metrics, applied=engine.step())


def _one_pass(engine: StepEngine, objective: Objective, batch: Batch) -> Tensor:
    """The whole local batch is one chunk: plain forward and backward."""
    query_BMD, target_BMD = engine.encode(batch.query_chunks[0]), engine.encode(batch.target_chunks[0])
    loss, metrics = objective(query_BMD, target_BMD, batch)
    engine.backward(loss, True)
    return metrics


def _two_passes(engine: StepEngine, objective: Objective, batch: Batch) -> Tensor:
    chunks = (*batch.query_chunks, *batch.target_chunks)
    embeddings, random_states = encode_without_graph(engine.encode, chunks)
    leaves = [embedding.requires_grad_() for embedding in embeddings]
    num_queries = len(batch.query_chunks)
    loss, metrics = objective(torch.cat(leaves[:num_queries]), torch.cat(leaves[num_queries:]), batch)
    gradients = torch.autograd.grad(loss, leaves)
    backward_through_chunks(engine.encode, chunks, gradients, random_states, engine.backward)
    return metrics
