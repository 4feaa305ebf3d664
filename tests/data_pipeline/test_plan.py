from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agff.errors import ConfigError
from data_pipeline.manifest import Manifest, Shard, Source
from data_pipeline.plan import PERIOD, VERSION, WINDOW, Mixture, Plan
from data_pipeline.plan_changes import plan_changes
from data_pipeline.storage import StoredFile


def manifest(**sizes: list[int]) -> Manifest:
    sources = {}
    for name, shards in sizes.items():
        sources[name] = Source(
            num_rows=sum(shards),
            num_rejected=0,
            shards=tuple(
                Shard(
                    name=f"{name}-{i:05d}.tar",
                    num_samples=size,
                    size_bytes=0,
                    sha256=hashlib.sha256(f"{name}{i}".encode()).hexdigest(),
                )
                for i, size in enumerate(shards)
            ),
            index=StoredFile(name="index.arrow", size_bytes=0, sha256="00" * 32),
        )
    return Manifest(sources=sources, settings={})


shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=2 * WINDOW + 3).filter(
    lambda sizes: sum(sizes) >= 4
)


@settings(max_examples=60, deadline=None)
@given(a=shard_sizes, b=shard_sizes, seed=st.integers(0, 2**31))
def test_every_sample_exactly_once_in_each_epoch_of_its_source(a: list[int], b: list[int], seed: int) -> None:
    plan = Plan(manifest(a=a, b=b), Mixture(sub_batch_size=2), seed=seed, global_batch_size=4)
    seen: dict[int, list[int]] = {0: [], 1: []}
    step = 0
    while min(len(seen[0]) / sum(a), len(seen[1]) / sum(b)) < 2 and step < 2000:
        for source, sample in plan.global_batch(step):
            seen[int(source)].append(int(sample))
        step += 1
    for source, total in ((0, sum(a)), (1, sum(b))):
        for epoch in range(len(seen[source]) // total):
            assert sorted(seen[source][epoch * total : (epoch + 1) * total]) == list(range(total))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(shard_sizes, min_size=1, max_size=3),
    seed=st.integers(0, 100),
    step=st.integers(0, 10**7),
    sub_batch=st.sampled_from([1, 2, 4]),
)
def test_global_batch_is_the_same_for_any_number_of_ranks_and_of_single_source_parts(
    sizes: list[list[int]], seed: int, step: int, sub_batch: int
) -> None:
    source_sizes = {f"s{i}": s for i, s in enumerate(sizes)}
    plan = Plan(manifest(**source_sizes), Mixture(sub_batch_size=sub_batch), seed=seed, global_batch_size=8)
    whole = plan.global_batch(step)
    for world_size in (1, 2, 4, 8):  # fewer, as many and more ranks than sub-batches
        taken = []
        for rank in range(world_size):
            numbers = plan.row_numbers(rank=rank, world_size=world_size)
            assert len(numbers) == 8 // world_size
            assert np.array_equal(plan.rank_rows(step, rank=rank, world_size=world_size), whole[numbers])
            taken += numbers.tolist()
        assert sorted(taken) == list(range(8)), "every row exactly once"
    for start in range(0, 8, sub_batch):
        assert len(set(whole[start : start + sub_batch, 0].tolist())) == 1


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_every_rank_holds_of_each_source_as_many_pairs_as_the_others(world_size: int) -> None:
    """Wherever the ranks divide a sub-batch: none has all the images and another all the class names."""
    sizes = manifest(a=[500], b=[700], c=[900])
    plan = Plan(sizes, Mixture(sub_batch_size=64), seed=0, global_batch_size=1024)
    for step in range(3):
        counts = np.array(
            [
                np.bincount(plan.rank_rows(step, rank=rank, world_size=world_size)[:, 0], minlength=3)
                for rank in range(world_size)
            ]
        )
        assert (counts == counts[0]).all()


def test_looking_up_a_step_equals_iterating_to_it() -> None:
    def new_plan() -> Plan:
        return Plan(manifest(a=[5] * 20, b=[3] * 30), Mixture(sub_batch_size=4), seed=3, global_batch_size=16)

    iterated = [
        new_plan_batch for plan in [new_plan()] for new_plan_batch in map(plan.global_batch, range(600))
    ]
    for step in (0, 1, 255, 256, 599):
        assert np.array_equal(new_plan().global_batch(step), iterated[step])


def test_literal_rows_of_a_plan() -> None:
    """numpy promises no stable stream: another order under the same VERSION would break every resume.

    If this fails and nobody changed the plan, numpy did; raise VERSION.
    """
    plan = Plan(
        manifest(a=[3] * 10, b=[4, 5]),
        Mixture(sub_batch_size=2, weights={"a": 2, "b": 1}, caps={"b": 6}),
        seed=7,
        global_batch_size=6,
    )
    assert VERSION == 2
    assert {step: plan.global_batch(step).tolist() for step in (0, 1, 2, 3, 4, 1000)} == {
        0: [[0, 27], [0, 20], [0, 24], [0, 29], [0, 5], [0, 0]],
        1: [[1, 3], [1, 5], [0, 4], [0, 15], [0, 9], [0, 28]],
        2: [[0, 10], [0, 16], [0, 18], [0, 2], [0, 12], [0, 1]],
        3: [[0, 11], [0, 13], [0, 26], [0, 14], [0, 19], [0, 25]],
        4: [[1, 7], [1, 6], [0, 3], [0, 17], [1, 2], [1, 8]],
        1000: [[0, 29], [0, 12], [0, 24], [0, 3], [0, 7], [0, 17]],
    }
    redrawn = [[plan.redraw(step, row, attempt=n) for n in range(1, 6)] for step, row in ((0, 0), (2, 4))]
    assert redrawn == [[13, 13, 23, 6, 26], [29, 0, 1, 25, 22]]


def test_shares_of_sources_follow_the_weights_exactly_in_every_period() -> None:
    plan = Plan(
        manifest(a=[50], b=[50], c=[50]),
        Mixture(sub_batch_size=2, weights={"a": 5, "b": 3}),
        seed=0,
        global_batch_size=8,
    )
    assert plan.source_names == ("a", "b")
    steps_per_period = PERIOD // 4
    for period in range(2):
        steps = range(period * steps_per_period, (period + 1) * steps_per_period)
        counts = Counter(int(source) for step in steps for source in plan.global_batch(step)[::2, 0])
        assert counts == {0: 640, 1: 384}


def test_order_depends_on_the_seed_and_mixes_shards_inside_a_window_only() -> None:
    sizes = manifest(a=[10] * (3 * WINDOW))
    plans = [Plan(sizes, Mixture(sub_batch_size=10), seed=seed, global_batch_size=10) for seed in (0, 1)]
    orders = [np.concatenate([plan.global_batch(step)[:, 1] for step in range(3 * WINDOW)]) for plan in plans]
    assert not np.array_equal(*orders)
    window = orders[0][: 10 * WINDOW] // 10
    assert len(set(window.tolist())) == WINDOW, "the first window's samples come from WINDOW shards"
    assert not (np.diff(window) == 0).all()


def test_redraw_is_deterministic_and_stays_in_the_source() -> None:
    plan = Plan(manifest(a=[50], b=[7]), Mixture(sub_batch_size=4), seed=0, global_batch_size=8)
    for step in range(20):
        rows = plan.global_batch(step)
        for row in (0, 5):
            drawn = [plan.redraw(step, row, attempt=attempt) for attempt in range(1, 6)]
            assert drawn == [plan.redraw(step, row, attempt=attempt) for attempt in range(1, 6)]
            assert all(0 <= sample < (50, 7)[rows[row, 0]] for sample in drawn)
    assert len({plan.redraw(0, 0, attempt=attempt) for attempt in range(1, 20)}) > 3


def test_changes_of_whatever_decides_the_order_are_named() -> None:
    base = {"mixture": Mixture(sub_batch_size=2), "seed": 0, "global_batch_size": 8}
    sizes = manifest(a=[5, 5], b=[10])
    old = json.loads(json.dumps(Plan(sizes, **base).description))  # as a checkpoint keeps it
    assert plan_changes(old, Plan(manifest(a=[5, 5], b=[10]), **base).description) == []
    for changed, message in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"global_batch_size": 4}, "global_batch_size: 8 -> 4"),
        ({"mixture": Mixture(sub_batch_size=4)}, "sub_batch_size: 2 -> 4"),
        ({"mixture": Mixture(sub_batch_size=2, weights={"a": 1, "b": 10})}, "source a: share 512 -> 94"),
        ({"mixture": Mixture(sub_batch_size=2, caps={"a": 4})}, "source a: samples 10 -> 4"),
        ({"mixture": Mixture(sub_batch_size=2, weights={"b": 10})}, "source a was removed"),
    ):
        assert message in plan_changes(old, Plan(sizes, **{**base, **changed}).description)
    vectors = {"vectors": {"a": "1" * 64}}
    assert plan_changes({**old, **vectors}, {**old, **vectors}) == []
    assert plan_changes(old, {**old, **vectors}) == ["the teacher's vectors are others"]
    assert "source a: its shards are others" in plan_changes(
        old, Plan(manifest(a=[5, 6], b=[10]), **base).description
    )


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, share=st.floats(0.05, 1), seed=st.integers(0, 1000))
def test_a_cap_is_a_fixed_part_spread_over_all_shards(sizes: list[int], share: float, seed: int) -> None:
    cap = max(2, int(sum(sizes) * share))
    plan = Plan(manifest(a=sizes), Mixture(sub_batch_size=1, caps=cap), seed=seed, global_batch_size=1)
    assert plan.num_samples == {"a": min(cap, sum(sizes))}
    kept = min(cap, sum(sizes))
    epochs = [
        [int(plan.global_batch(epoch * kept + step)[0, 1]) for step in range(kept)] for epoch in range(2)
    ]
    assert len(set(epochs[0])) == kept
    assert set(epochs[0]) == set(epochs[1]), "the same part in every epoch"
    starts = np.cumsum([0, *sizes])
    for shard, size in enumerate(sizes):
        count = sum(starts[shard] <= sample < starts[shard + 1] for sample in epochs[0])
        assert abs(count - size * kept / sum(sizes)) <= 1
    assert {plan.redraw(0, 0, attempt=attempt) for attempt in range(1, 30)} <= set(epochs[0])


@pytest.mark.parametrize(
    ("weights", "sub_batch", "batch", "message"),
    [
        ({"a": 1, "c": 1}, 2, 8, "data.weights names c, absent from the shards; they hold a, b, empty"),
        ({"a": 0, "b": 1}, 2, 8, "data.weights.a=0 must be > 0 and finite; leave a source out to drop it"),
        ({"a": -1}, 2, 8, "data.weights.a=-1 must be > 0"),
        ({}, 2, 8, "the mixture names no source"),
        (None, 4, 8, "source b holds 3 samples, fewer than data.sub_batch_size=4"),
        ({"empty": 1}, 2, 8, "source empty is empty; leave it out with data.weights"),
        (None, 3, 8, "global_batch_size=8 is not a multiple of data.sub_batch_size=3"),
    ],
)
def test_impossible_mixtures_are_named(
    weights: dict | None, sub_batch: int, batch: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(
            manifest(a=[10], b=[3], empty=[0]) if weights else manifest(a=[10], b=[3]),
            Mixture(sub_batch_size=sub_batch, weights=weights),
            seed=0,
            global_batch_size=batch,
        )


def test_every_source_that_cannot_be_mixed_in_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Plan(
            manifest(a=[10], b=[3], c=[0]),
            Mixture(sub_batch_size=4, weights={"a": -1, "b": float("inf"), "c": 1}, caps={"a": 2}),
            seed=0,
            global_batch_size=8,
        )
    starts = ("data.weights.a=-1", "data.caps: 2 samples of a", "data.weights.b=inf", "source b holds 3")
    lines = str(caught.value).splitlines()
    expected = (*starts, "source c is empty")
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_more_ranks_than_rows_is_a_wrong_call() -> None:
    plan = Plan(manifest(a=[10]), Mixture(sub_batch_size=2), seed=0, global_batch_size=8)
    with pytest.raises(ValueError, match="global batch of 8 rows for 3 ranks"):
        plan.rank_rows(0, rank=0, world_size=3)
