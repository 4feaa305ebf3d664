"""Which chunks pass 1 encodes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from agff.batch import Encoded, ModelInputs
from agff.embedding_model import draws_random_numbers
from agff.joined import PADDING, groups_of, split_into
from agff.objectives.contrastive import Contrastive
from agff.objectives.objective import Head
from agff.similarity import FusionConfig
from agff.step import train_step
from tests.agff.test_step import PlainEngine
from tests.agff.tiny import batch_of, global_rows, tiny_model


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 200)), max_size=12),
    num_at_once=st.integers(1, 5),
    more=st.integers(0, 12),
)
def test_groups_hold_every_chunk_once_and_no_more_than_they_may(
    sizes: list[tuple[int, int]], num_at_once: int, more: int
) -> None:
    groups = groups_of(sizes, num_at_once)
    num_groups = min(len(sizes), len(groups) + more)
    for found in (groups, split_into(groups, num_groups)):
        assert [index for group in found for index in range(len(sizes))[group]] == list(range(len(sizes)))
        for group in found:
            rows, widths = zip(*sizes[group], strict=True)
            assert 1 <= len(rows) <= num_at_once
            assert min(widths) >= PADDING * max(widths)
            assert sum(rows) * max(widths) <= num_at_once * max(r * w for r, w in sizes)
    assert len(split_into(groups, num_groups)) == num_groups


def test_chunks_of_a_token_budget_stay_within_it() -> None:
    """One row of 1000 tokens, two of 500, four of 250, eight of 125: joined they would be 15 x 1000."""
    assert len(groups_of([(1, 1000), (2, 500), (4, 250), (8, 125)], 4)) == 4
    assert groups_of([(1, 100), (1, 95), (1, 90), (2, 50)], 4) == [slice(0, 3), slice(3, 4)]


@pytest.mark.parametrize("dropout", [nn.Dropout(0.1), nn.Dropout2d(0.5)], ids=str)
def test_a_model_with_dropout_draws_random_numbers(dropout: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), dropout)
    assert draws_random_numbers(model)
    assert not draws_random_numbers(model.eval())
    assert not draws_random_numbers(nn.Sequential(nn.Dropout(0.0)))
    assert not draws_random_numbers(tiny_model(0))


class Masks(Head):
    is_random = True


def test_a_random_head_and_dropped_attention_draw_random_numbers() -> None:
    assert draws_random_numbers(Masks())
    model = tiny_model(0)
    attention: Any = next(m for m in model.modules() if hasattr(m, "attention_dropout"))
    attention.attention_dropout = 0.1
    assert draws_random_numbers(model)


class ReadsSpans(Head):
    """Of an input that no backbone and no tower knows; in bfloat16, to be promoted."""

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        return {"span": (inputs["span_B"] * embedding_BMD[:, 0, 0]).to(torch.bfloat16)}


def test_an_input_of_a_head_reaches_it_in_both_passes_and_its_output_is_float32() -> None:
    seen = []

    class Engine(PlainEngine):
        def encode(self, inputs: ModelInputs) -> Encoded:
            seen.append(super().encode(inputs))
            return seen[-1]

    batch = batch_of(global_rows(4, 0, rows_without_image=range(0)), 2, 0)
    chunks = tuple({**chunk, "span_B": torch.arange(len(chunk["input_ids"]))} for chunk in batch.chunks)
    engine = Engine(tiny_model(0, head=ReadsSpans()), 2)
    train_step(engine, Contrastive(), FusionConfig(), dataclasses.replace(batch, chunks=chunks))
    assert {encoded["span"].dtype for encoded in seen} == {torch.float32}
