"""Padding and waiting, on a mixture with the lengths of MMEB."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data_pipeline.balance import Balance
from data_pipeline.collate import Chunking, FixedRows, TokenBudget
from data_pipeline.plan import Mixture, Plan
from tests.data_pipeline.test_plan import manifest
from tests.mmeb_like import SUBSETS, Length

PROMPTS, LONGEST = 5, 1024
LIMITS = {"factor": 28, "min_pixels": 3136, "max_pixels": 602112}
"""Of mmeb_qwen2vl_2b.yaml: pixels of a token's side, of an image."""


def num_tokens(item: Length) -> int:
    """Of Qwen2-VL."""
    if item.image is None:
        return item.num_text_tokens + PROMPTS
    height, width = smart_resize(item.image[1], item.image[0], **LIMITS)
    tokens = height * width // LIMITS["factor"] ** 2 + 2
    return min(tokens + item.num_text_tokens + PROMPTS, LONGEST)


SAMPLES, BATCH, RANKS, STEPS = 5_000, 1024, 8, 25


@cache
def balance(chunking: Chunking, *, is_strided: bool) -> Balance:
    sizes = manifest(**{name: [1000] * (SAMPLES // 1000) for name in SUBSETS})
    plan = Plan(sizes, Mixture(sub_batch_size=64), seed=0, global_batch_size=BATCH)
    generator = np.random.default_rng(0)
    sides = [[list(side.draw(generator, SAMPLES)) for side in SUBSETS[name]] for name in plan.source_names]
    total = Balance()
    for step in range(STEPS):
        batch = plan.global_batch(step)
        lengths = []
        for rank in range(RANKS):
            rows = plan.rank_rows(step, rank=rank, world_size=RANKS)
            if not is_strided:
                rows = batch[rank * len(rows) : (rank + 1) * len(rows)]
            distinct = {
                (int(source), side, items[sample].content): items[sample]
                for source, sample in rows
                for side, items in enumerate(sides[source])
            }
            lengths.append([num_tokens(item) for item in distinct.values()])
        total += Balance.of_step(lengths, chunking)
    return total


PADDING = {
    FixedRows(rows=4): 0.05,
    FixedRows(rows=8): 0.05,
    TokenBudget(max_tokens=4096): 0.1,
    # forty images at once, of which the smallest may have half the tokens of the largest
    TokenBudget(max_tokens=16384): 0.15,
}
"""Share of the computed tokens, at most."""


@pytest.mark.parametrize("chunking", PADDING)
def test_ranks_hardly_wait_for_each_other_and_little_is_padding(chunking: Chunking) -> None:
    found = balance(chunking, is_strided=True)
    assert found.imbalance(zero_stage=1) <= 1.05
    assert found.imbalance(zero_stage=3) <= 1.1
    assert found.padding_share <= PADDING[chunking]


@pytest.mark.parametrize("chunking", PADDING)
def test_consecutive_rows_would_make_them_wait(chunking: Chunking) -> None:
    """So that the figures above say something of the rows, not of the mixture."""
    found = balance(chunking, is_strided=False)
    assert found.imbalance(zero_stage=1) > 1.25
    assert found.imbalance(zero_stage=3) > 1.25


def test_waiting_is_what_the_slowest_rank_costs_more() -> None:
    found = Balance.of_step([[10, 9, 2, 2], [6, 4, 4, 4], [1]], FixedRows(rows=2))
    assert (found.num_tokens, found.num_padded) == (23 + 18 + 1, (20 + 4) + (12 + 8) + 1)
    assert found.padding_share == pytest.approx(1 - 42 / 45)
    assert found.imbalance(zero_stage=1) == found.imbalance(zero_stage=2) == pytest.approx(3 * 24 / 45)
    assert found.imbalance(zero_stage=3) == pytest.approx(3 * (20 + 8) / 45)
    assert (found + found).imbalance(zero_stage=3) == found.imbalance(zero_stage=3)
