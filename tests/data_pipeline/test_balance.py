"""Padding and waiting, on a mixture with the lengths of MMEB."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.balance import Balance
from data_pipeline.collate import Chunking, FixedRows, TokenBudget
from data_pipeline.plan import Mixture, Plan
from tests.data_pipeline.test_plan import manifest

Side = Callable[[np.random.Generator, int], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""(content ids, tokens) of this many items."""
PROMPTS, LONGEST = 5, 1024


def texts(low: int, high: int, *, num_different: int = 10**9) -> Side:
    def draw(generator: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids = generator.integers(num_different, size=count)
        return ids, np.random.default_rng(0).integers(low, high + 1, size=10**5)[ids % 10**5] + PROMPTS

    return draw


def images(low: int, high: int, *, text: int = 12) -> Side:
    def draw(generator: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = np.minimum(generator.integers(low, high + 1, size=count), LONGEST - text - PROMPTS)
        return generator.integers(10**15, size=count), tokens + text + PROMPTS

    return draw


MMEB_LIKE: dict[str, tuple[Side, Side]] = {
    **{
        f"classification{n}": (images(300, 500), texts(2, 6, num_different=count))
        for n, count in enumerate((1000, 24, 2, 20, 397))
    },
    **{f"vqa{n}": (images(350, 550, text=25), texts(1, 8)) for n in range(3)},
    **{f"document{n}": (images(900, 1300, text=30), texts(1, 12)) for n in range(3)},
    "dialogue": (texts(120, 220), images(300, 500)),
    "composed": (images(300, 700, text=40), images(300, 700)),
    **{f"caption_to_image{n}": (texts(20, 40), images(250, 1000)) for n in range(3)},
    **{f"image_to_caption{n}": (images(250, 1000), texts(20, 40)) for n in range(2)},
    "similar": (images(350, 400), images(350, 400)),
    "grounding": (images(300, 500, text=30), images(60, 400)),
}
SAMPLES, BATCH, RANKS, STEPS = 5_000, 1024, 8, 25


@cache
def balance(chunking: Chunking, *, is_strided: bool) -> Balance:
    sizes = manifest(**{name: [1000] * (SAMPLES // 1000) for name in MMEB_LIKE})
    plan = Plan(sizes, Mixture(sub_batch_size=64), seed=0, global_batch_size=BATCH)
    generator = np.random.default_rng(0)
    sides = [[side(generator, SAMPLES) for side in MMEB_LIKE[name]] for name in plan.source_names]
    total = Balance()
    for step in range(STEPS):
        batch = plan.global_batch(step)
        lengths = []
        for rank in range(RANKS):
            rows = plan.rank_rows(step, rank=rank, world_size=RANKS)
            if not is_strided:
                rows = batch[rank * len(rows) : (rank + 1) * len(rows)]
            distinct = {
                (int(source), side, int(ids[sample]), int(tokens[sample]))
                for source, sample in rows
                for side, (ids, tokens) in enumerate(sides[source])
            }
            lengths.append([tokens for *_, tokens in distinct])
        total += Balance.of_step(lengths, chunking)
    return total


CHUNKINGS = (
    FixedRows(rows=4),
    FixedRows(rows=8),
    TokenBudget(max_tokens=4096),
    TokenBudget(max_tokens=16384),
)


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_ranks_hardly_wait_for_each_other_and_little_is_padding(chunking: Chunking) -> None:
    found = balance(chunking, is_strided=True)
    assert found.imbalance(zero_stage=1) <= 1.05
    assert found.imbalance(zero_stage=3) <= 1.1
    assert found.padding_share <= 0.1


@pytest.mark.parametrize("chunking", CHUNKINGS)
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
