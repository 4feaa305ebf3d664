"""Rows of the start-up table that are read from the data."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agff.batch import Batch
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.balance import MOST_PAIRS, measure_balance
from data_pipeline.collate import FixedRows
from data_pipeline.convert import prepare
from data_pipeline.loader import StepBatches
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ShardReader
from data_pipeline.remote import CacheConfig, open_folder
from data_pipeline.storage import LocalFolder
from launcher.run import measured_batches
from launcher.run.data import RunData
from tests.drawings import tiny_backbone, write_drawings

BATCH = 16


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunData, ItemProcessor]:
    folder = tmp_path_factory.mktemp("measured")
    manifest = prepare(write_drawings(folder / "d").mmeb, folder / "out", rows_per_shard=10)
    plan = Plan(manifest, Mixture(sub_batch_size=4), seed=0, global_batch_size=BATCH)
    processor = ItemProcessor.from_folder(
        tiny_backbone(folder / "backbone"), prompts=PromptConfig(num_fine=2), limits=ProcessorConfig()
    )
    return RunData(folder=LocalFolder(folder / "out"), manifest=manifest, plan=plan), processor


def run_of(**choices: Any) -> Any:
    data = SimpleNamespace(with_negatives=True, cache=choices.get("cache", CacheConfig()))
    batch = SimpleNamespace(chunk_size=choices.get("chunk_size", 4))
    config = SimpleNamespace(num_steps=choices.get("num_steps", 3), data=data, batch=batch)
    return SimpleNamespace(config=config, world_size=2, zero_stage=3, chunking=FixedRows(rows=4))


@pytest.mark.parametrize("with_negatives", [True, False])
def test_what_is_measured_before_the_run_is_what_the_loader_makes(
    drawn: tuple[RunData, ItemProcessor], with_negatives: bool
) -> None:
    data, processor = drawn
    reader, chunking = ShardReader(data.folder, data.manifest), FixedRows(rows=4)
    measured = measure_balance(
        data.plan,
        reader,
        processor,
        chunking,
        world_size=2,
        num_steps=3,
        with_negatives=with_negatives,
        limit_s=600,
    )
    assert measured is not None
    assert (measured.num_steps, measured.num_ranks) == (3, 2)
    batches = [
        StepBatches(
            plan=data.plan,
            reader=reader,
            process=processor,
            rank=rank,
            world_size=2,
            chunking=chunking,
            max_bad_in_a_row=0,
            with_negatives=with_negatives,
        )[step]
        for step in range(3)
        for rank in range(2)
    ]
    chunks = [chunk for batch in batches for chunk in cast(Batch, batch).chunks]
    lengths = [chunk["prompt_start_B"] + processor.prompts.num_tokens for chunk in chunks]
    assert measured.balance.num_tokens == sum(int(length_B.sum()) for length_B in lengths)
    longest = [len(own) * int(own.max()) for own in lengths]  # the blank image is not counted
    assert measured.balance.num_padded == sum(longest)


def test_rows_say_what_was_measured(drawn: tuple[RunData, ItemProcessor]) -> None:
    rows = measured_batches.measured_batches(run_of(), *drawn)
    assert re.fullmatch(r"\d+\.\d % of the computed tokens \(first 3 steps\)", rows["padding"])
    assert re.fullmatch(r"1\.\d\d x the tokens of .*\(first 3 steps\); image .*", rows["rank imbalance"])


def test_of_a_large_batch_some_ranks_are_read(drawn: tuple[RunData, ItemProcessor]) -> None:
    data, processor = drawn
    plan = Plan(data.manifest, Mixture(sub_batch_size=4), seed=0, global_batch_size=8 * MOST_PAIRS)
    large = RunData(folder=data.folder, manifest=data.manifest, plan=plan)
    run = run_of()
    run.world_size = MOST_PAIRS
    measured = measure_balance(
        plan,
        ShardReader(large.folder, large.manifest),
        processor,
        FixedRows(rows=4),
        world_size=MOST_PAIRS,
        num_steps=100,
        with_negatives=True,
        limit_s=600,
    )
    assert measured is not None
    assert (measured.num_steps, measured.num_ranks) == (1, MOST_PAIRS // 8)


def test_what_cannot_be_measured_is_said_with_its_reason(
    drawn: tuple[RunData, ItemProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, processor = drawn
    monkeypatch.setattr(measured_batches, "LIMIT_S", -1)
    rows = measured_batches.measured_batches(run_of(), data, processor)
    assert rows["padding"] == "not measured: the pairs of one step were not read within -1 s"
    searched = measured_batches.measured_batches(run_of(chunk_size="auto"), data, processor)
    assert set(searched.values()) == {"not measured: the chunks are found before the first step"}
    gone = RunData(folder=LocalFolder(tmp_path), manifest=data.manifest, plan=data.plan)
    assert measured_batches.measured_batches(run_of(), gone, processor)["padding"].startswith(
        "not measured: "
    )


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (CacheConfig(), r"\d+ of 0\.00 GiB in the first 3 steps, on every machine"),
        (
            CacheConfig(max_gib=1e-5),
            r".*more than its cache holds, so shards are fetched again; raise data.cache.max_gib=1e-05 or "
            r"lower data.cache.fetch_ahead_steps=32",
        ),
    ],
)
def test_of_remote_shards_the_table_says_what_every_machine_must_hold(
    drawn: tuple[RunData, ItemProcessor], cache: CacheConfig, message: str
) -> None:
    data, processor = drawn
    remote = RunData(folder=open_folder("memory://x", cache), manifest=data.manifest, plan=data.plan)
    rows = measured_batches.measured_batches(run_of(cache=cache), remote, processor)
    assert rows["padding"].startswith("not measured: the shards are remote")
    assert re.fullmatch(message, rows["shards ahead"])
    shards = data.plan.shards(range(3))
    read = {
        (
            data.plan.source_names[source],
            ShardReader(data.folder, data.manifest).shard_name(name, int(sample)),
        )
        for step in range(3)
        for source, sample in data.plan.global_batch(step)
        for name in [data.plan.source_names[source]]
    }
    assert {(name, data.manifest.sources[name].shards[index].name) for name, index in shards} == read
