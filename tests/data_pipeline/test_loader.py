from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agff.batch import NO_CONTENT, Batch, Item, ModelInputs, SkippedSample
from agff.errors import DataError
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.text_only import TextsAlone
from data_pipeline import loader
from data_pipeline.collate import FixedRows, TokenBudget
from data_pipeline.convert import prepare
from data_pipeline.loader import StepBatches, load_batches
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from tests.drawings import tiny_backbone, write_drawings


class Encoder:
    """Lengths and a pixel: enough to tell items apart."""

    def num_tokens(self, item: Item) -> int:
        return len(item.text)

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        for item in (item for item in items if "refuse me" in item.text):
            raise item.error("this item does not fit")
        pixels = [item.image.getpixel((28, 10)) if item.image else (0, 0, 0) for item in items]
        lengths = [len(item.text) for item in items]
        return {
            "prompt_start_B": torch.tensor(lengths),
            "pixels": torch.tensor(pixels),
        }


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out", manifest


def batches_of(
    shards: tuple[Path, Manifest], *, rank: int = 0, world_size: int = 1, **choices: Any
) -> StepBatches:
    folder, manifest = shards
    mixture = Mixture(sub_batch_size=4, weights=choices.pop("weights", None))
    return StepBatches(
        plan=choices.pop("plan", None) or Plan(manifest, mixture, seed=0, global_batch_size=8),
        reader=ShardReader(LocalFolder(folder), manifest),
        process=choices.pop("process", None) or Encoder(),
        rank=rank,
        world_size=world_size,
        chunking=choices.pop("chunking", FixedRows(rows=2)),
        max_bad_in_a_row=choices.pop("max_bad_in_a_row", 3),
        **choices,
    )


def flat(batch: Batch) -> list[Any]:
    chunks = [x.tolist() for chunk in batch.chunks for x in chunk.values()]
    return [
        batch.addresses,
        batch.skipped,
        *(
            x.tolist()
            for x in (batch.query_ids_B, batch.target_ids_B, batch.negative_ids_N, batch.row_of_item_R)
        ),
        chunks,
    ]


def test_batches_do_not_depend_on_workers_or_on_where_the_run_started(shards: tuple[Path, Manifest]) -> None:
    def run(num_workers: int, start_step: int) -> list[Any]:
        return [
            flat(batch)
            for batch in load_batches(
                batches_of(shards), start_step=start_step, num_steps=6, num_workers=num_workers
            )
        ]

    expected = run(0, 0)
    assert len(expected) == 6
    assert run(2, 0) == expected
    assert run(1, 4) == expected[4:]


def test_ranks_share_out_one_global_batch_in_equal_chunks(shards: tuple[Path, Manifest]) -> None:
    whole = batches_of(shards)[5]
    parts = [batches_of(shards, rank=rank, world_size=2)[5] for rank in range(2)]
    assert isinstance(whole, Batch)
    for rank, part in enumerate(parts):
        assert isinstance(part, Batch)
        assert part.addresses == whole.addresses[rank::2]
    for part in parts:
        assert isinstance(part, Batch)
        assert part.num_pairs == 4
        assert [len(chunk["pixels"]) for chunk in part.chunks[:-1]] == [2] * (len(part.chunks) - 1)


def test_the_training_random_state_is_left_alone(shards: tuple[Path, Manifest]) -> None:
    for num_workers in (0, 1):
        before = torch.get_rng_state()
        next(load_batches(batches_of(shards), start_step=0, num_steps=2, num_workers=num_workers))
        assert torch.equal(torch.get_rng_state(), before)


def damage(folder: Path, old: bytes, new: bytes, *, shard: str = "*") -> None:
    for path in folder.glob(f"Shapes_i2t/{shard}.tar"):
        path.write_bytes(path.read_bytes().replace(old, new))


def test_a_bad_sample_is_listed_and_another_of_its_source_drawn(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    damage(folder, b"IDAT", b"XXXX", shard="*-00000")
    runs = [[batches_of(shards, max_bad_in_a_row=50)[step] for step in range(12)] for _ in range(2)]
    skipped = [sample.reason for batch in runs[0] if isinstance(batch, Batch) for sample in batch.skipped]
    assert skipped
    for message in skipped:
        assert message.startswith("Shapes_i2t-00000.tar:")
        assert "is a damaged PNG: its header cannot be read" in message
    for first, second in zip(*runs, strict=True):
        assert isinstance(first, Batch)
        assert isinstance(second, Batch)
        assert flat(first) == flat(second)
        assert not any(address.startswith("Shapes_i2t-00000") for address in first.addresses)
        if first.skipped:
            assert any(address.startswith("Shapes_i2t-0000") for address in first.addresses)


def test_what_is_drawn_for_bad_samples_does_not_depend_on_the_number_of_ranks(
    shards: tuple[Path, Manifest],
) -> None:
    damage(shards[0], b"IDAT", b"XXXX", shard="*-00000")
    for step in range(12):
        whole = batches_of(shards, max_bad_in_a_row=50)[step]
        assert isinstance(whole, Batch)
        skipped: list[SkippedSample] = []
        for rank in range(4):
            part = batches_of(shards, rank=rank, world_size=4, max_bad_in_a_row=50)[step]
            assert isinstance(part, Batch)
            assert part.addresses == whole.addresses[rank::4]
            skipped += part.skipped
        assert Counter(skipped) == Counter(whole.skipped)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_cannot_be_read_at_all_ends_the_run_and_draws_nothing_else(
    shards: tuple[Path, Manifest], num_workers: int
) -> None:
    """Else the batches would depend on what the network did."""
    (shards[0] / "Shapes_i2t/Shapes_i2t-00000.tar").unlink()
    expected = batches_of(shards, weights={"Shapes_i2t": 1}, max_bad_in_a_row=50)
    batches = load_batches(expected, start_step=0, num_steps=40, num_workers=num_workers)
    skipped: list[SkippedSample] = []
    with pytest.raises(DataError, match=r"^Shapes_i2t-00000.tar: cannot read the shard: .*No such file"):
        skipped.extend(sample for batch in batches for sample in batch.skipped)
    assert skipped == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_in_a_row_are_an_error_with_addresses(
    shards: tuple[Path, Manifest], num_workers: int
) -> None:
    damage(shards[0], b"IDAT", b"XXXX")
    batches = load_batches(
        batches_of(shards, weights={"Shapes_i2t": 1}), start_step=0, num_steps=2, num_workers=num_workers
    )
    with pytest.raises(
        DataError, match=r"^4 bad samples in a row for row 0 of step 0, .*:(\n  Shapes_i2t-0000\d.tar:.*){4}$"
    ):
        next(batches)


def test_an_item_that_the_backbone_refuses_is_skipped_with_its_address(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    damage(folder, b"three black square bottom", b"refuse me, this one, yes!")
    seen = [batches_of(shards, weights={"Shapes_i2t": 1})[step] for step in range(4)]
    skipped = [sample.reason for batch in seen if isinstance(batch, Batch) for sample in batch.skipped]
    assert all(
        "this item does not fit" in message and message.startswith("Shapes_i2t-") for message in skipped
    )
    assert skipped


# ------------------------------------------------------------------ hard negatives and chunks by tokens


def test_explicit_negatives_follow_the_targets(shards: tuple[Path, Manifest]) -> None:
    batch = batches_of(shards, weights={"Shapes_t2i": 1})[0]
    assert isinstance(batch, Batch)
    assert batch.num_negatives == batch.num_pairs == 8
    _, targets, negatives = batch.split({"pixels": torch.cat([chunk["pixels"] for chunk in batch.chunks])})
    assert not torch.equal(targets["pixels"], negatives["pixels"])
    reader = ShardReader(LocalFolder(shards[0]), shards[1])
    by_address = {raw.address: raw for raw in (reader.read("Shapes_t2i", n) for n in range(24))}
    expected = [by_address[address].record["negative"]["id"] for address in batch.addresses]
    assert batch.negative_ids_N.tolist() == expected
    without = batches_of(shards, weights={"Shapes_t2i": 1}, with_negatives=False)[0]
    assert isinstance(without, Batch)
    assert (without.num_negatives, len(without.chunks)) == (0, 8)


def test_items_keep_their_order_whatever_the_chunks(shards: tuple[Path, Manifest]) -> None:
    seen = []
    for chunking in (FixedRows(rows=2), FixedRows(rows=8), TokenBudget(max_tokens=120)):
        batch = batches_of(shards, chunking=chunking)[3]
        assert isinstance(batch, Batch)
        batch = batch.padded_to(num_chunks=len(batch.chunks) + 2, num_negatives=batch.num_negatives + 1)
        query, target, negative = (
            side["pixels"]
            for side in batch.split({"pixels": torch.cat([chunk["pixels"] for chunk in batch.chunks])})
        )
        seen.append((query.tolist(), target.tolist(), negative[:-1].tolist()))
        assert batch.negative_ids_N[-1] == NO_CONTENT
    assert seen[0] == seen[1] == seen[2]


# ------------------------------------------------------------------ stalls and deaths


def block(folder: Path) -> None:
    """Every shard of one source becomes a pipe that nobody writes to: reading it never ends."""
    for path in folder.glob("Shapes_i2t/*.tar"):
        path.unlink()
        os.mkfifo(path)


def test_a_stalled_read_is_named_warned_of_and_ended(
    shards: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "WARN_AFTER_S", 1)
    block(shards[0])
    batches = batches_of(shards, weights={"Shapes_i2t": 1}, rank=1, world_size=2)
    started = time.monotonic()
    where = (
        rf"the batch of step 0: worker 0 has been reading {shards[0]}/Shapes_i2t/Shapes_i2t-0000\d.tar for "
        rf"\d s"
    )
    with pytest.raises(
        DataError, match=rf"^rank 1 has waited 3 s for {where}; gave up after data.stalled_after_s=3"
    ):
        next(load_batches(batches, start_step=0, num_steps=3, num_workers=1, stalled_after_s=3))
    assert time.monotonic() - started < 20
    assert 1 <= len(caplog.records) <= 2
    assert all(re.match(rf"rank 1 has waited \d s for {where}", record.message) for record in caplog.records)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(
    shards: tuple[Path, Manifest], num_workers: int
) -> None:
    """While the rank computes, the workers are ahead and would overwrite it, had they too few slots."""
    found = []
    for batch in load_batches(batches_of(shards), start_step=0, num_steps=12, num_workers=num_workers):
        time.sleep(0.1)
        found.append(flat(batch))
    assert found == [flat(batches_of(shards)[step]) for step in range(12)]


FAILS_IN_A_STEP = """
import sys
from pathlib import Path
from data_pipeline.loader import load_batches
from data_pipeline.manifest import read_manifest
from data_pipeline.storage import LocalFolder
from tests.data_pipeline.test_loader import batches_of
folder = Path(sys.argv[1])
batches = batches_of((folder, read_manifest(LocalFolder(folder))))
batches = load_batches(batches, start_step=0, num_steps=50, num_workers=1)
next(batches)
raise RuntimeError("a fault in a training step")
"""


def test_a_process_that_fails_in_a_step_ends_although_its_workers_outlive_signals(
    shards: tuple[Path, Manifest],
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FAILS_IN_A_STEP, str(shards[0])],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    assert "a fault in a training step" in result.stderr


def test_a_killed_worker_is_an_error_and_the_rest_of_the_run_is_unchanged(
    shards: tuple[Path, Manifest],
) -> None:
    def all_batches(start_step: int) -> Iterator[Batch]:
        return load_batches(batches_of(shards), start_step=start_step, num_steps=40, num_workers=1)

    expected = [flat(batch) for batch in all_batches(0)]
    found = []

    def kill_the_worker_after_three() -> None:
        for batch in all_batches(0):
            found.append(flat(batch))
            if len(found) == 3:
                for child in psutil.Process().children(recursive=True):
                    if "resource_tracker" not in " ".join(child.cmdline()):
                        child.kill()

    with pytest.raises((DataError, RuntimeError), match=r"worker"):  # torch may raise from its signal handler
        kill_the_worker_after_three()
    assert 3 <= len(found) < 40
    found += [flat(batch) for batch in all_batches(len(found))]
    assert found == expected


class Failing(Encoder):
    """Raises once it sees the mark."""

    def __init__(self, error: Exception, text: str) -> None:
        self.error, self.text = error, text

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        if any(self.text in item.text for item in items):
            raise self.error
        return super().__call__(items)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "error", [OSError(110, "Connection timed out"), KeyError("x"), RuntimeError("stack expects")]
)
def test_a_fault_of_the_program_is_an_error_of_its_own_step(
    shards: tuple[Path, Manifest], error: Exception, num_workers: int
) -> None:
    """It must reach the rank as DataError, on which all ranks end together, and never cost a batch
    silently."""
    clean = [flat(batches_of(shards)[step]) for step in range(8)]
    texts = [texts_of(batches_of(shards, process=Texts())[step]) for step in range(8)]
    bad, text = next(
        (step, text)
        for step in range(3, 8)
        for text in texts[step]
        if not any(text in other for earlier in texts[:step] for other in earlier)
    )
    found = []

    def run() -> None:
        batches = batches_of(shards, process=Failing(error, text))
        found.extend(
            flat(b) for b in load_batches(batches, start_step=0, num_steps=8, num_workers=num_workers)
        )

    with pytest.raises(DataError, match=rf"^step {bad}: {re.escape(repr(error))}"):
        run()
    assert found == [] or found == clean[:bad]


class Texts(Encoder):
    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        return {"texts": [item.text for item in items]}  # type: ignore[dict-item]


def texts_of(batch: Any) -> list[str]:
    return [text for chunk in batch.chunks for text in chunk["texts"]]


def test_nothing_is_fetched_ahead_beyond_the_last_step(
    shards: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        ShardReader,
        "fetch_ahead",
        lambda self, source, samples: asked.extend((source, int(sample)) for sample in samples),
    )
    batches = batches_of(shards, fetch_ahead_steps=3)
    for _ in load_batches(batches, start_step=0, num_steps=5, num_workers=0):
        pass
    planned = [batches.plan.global_batch(step).tolist() for step in range(5)]
    names = batches.plan.source_names
    assert Counter(asked) == Counter((names[source], sample) for rows in planned for source, sample in rows)


def test_a_shard_is_asked_for_once_a_step_whatever_its_samples(
    shards: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(LocalFolder, "fetch_ahead", lambda self, source, file: asked.append(file.name))
    batches_of(shards, world_size=2, fetch_ahead_steps=1, num_steps=1)[0]
    batches_of(shards, world_size=2)[0]  # a local folder: nothing is looked up for it
    batch = batches_of(shards, world_size=2)[0]
    assert isinstance(batch, Batch)
    assert sorted(asked) == sorted({address.partition(":")[0] for address in batch.addresses})


# ------------------------------------------------------------------ many shapes of data


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Manifest]]:
    """By rows per shard."""
    folder = tmp_path_factory.mktemp("many")
    mmeb = write_drawings(folder / "d").mmeb
    return {
        rows: (folder / f"out{rows}", prepare(mmeb, folder / f"out{rows}", rows_per_shard=rows))
        for rows in (1, 3, 10, 100)
    }


@settings(max_examples=150, deadline=None)
@given(
    rows_per_shard=st.sampled_from([1, 3, 10, 100]),
    sources=st.sets(st.sampled_from(["Shapes_t2i", "Shapes_i2t", "Shapes_VQA", "Shapes_text"]), min_size=1),
    world_size=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 10**6),
    start=st.integers(0, 10**5),
    cap=st.one_of(st.none(), st.integers(4, 30)),
)
def test_what_ranks_read_is_the_plan_whatever_ranks_shards_sources_and_seed(
    many_shards: dict[int, tuple[Path, Manifest]],
    rows_per_shard: int,
    sources: set[str],
    world_size: int,
    seed: int,
    start: int,
    cap: int | None,
) -> None:
    folder, manifest = many_shards[rows_per_shard]
    mixture = Mixture(sub_batch_size=2, weights=dict.fromkeys(sources, 1.0), caps=cap)
    plan = Plan(manifest, mixture, seed=seed, global_batch_size=8)
    parts = {}
    for rank in range(world_size):
        rows = FixedRows(rows=8 // world_size)
        batches = batches_of((folder, manifest), rank=rank, world_size=world_size, plan=plan, chunking=rows)
        batch = batches[start]
        assert isinstance(batch, Batch)
        assert batch.num_pairs == 8 // world_size
        parts |= dict(zip(range(rank, 8, world_size), batch.addresses, strict=True))
    reader = ShardReader(LocalFolder(folder), manifest)
    expected = [
        reader.read(plan.source_names[source], int(sample)).address
        for source, sample in plan.global_batch(start)
    ]
    assert [parts[row] for row in range(8)] == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on 2 cores
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_workers_do_not_change_the_batches(
    many_shards: dict[int, tuple[Path, Manifest]], num_workers: int
) -> None:
    for rows_per_shard in (1, 100):
        batches = batches_of(many_shards[rows_per_shard])
        found = load_batches(batches, start_step=17, num_steps=25, num_workers=num_workers)
        assert [flat(batch) for batch in found] == [flat(batches[step]) for step in range(17, 25)]


@pytest.mark.parametrize("source", ["Shapes_t2i", "Shapes_i2t", "Shapes_text"])
def test_an_image_in_training_on_texts_alone_is_a_bad_sample(
    shards: tuple[Path, Manifest], tmp_path: Path, source: str
) -> None:
    folder = tiny_backbone(tmp_path / "backbone")
    process = TextsAlone(ItemProcessor.from_folder(folder, prompts=PromptConfig(), limits=ProcessorConfig()))
    found = batches_of(shards, process=process, weights={source: 1.0}, max_bad_in_a_row=1)[0]
    if source == "Shapes_text":
        assert isinstance(found, Batch)
        assert all("pixel_values" not in chunk for chunk in found.chunks)
        return
    assert isinstance(found, DataError)
    lines = str(found).splitlines()
    assert lines[0].startswith("2 bad samples in a row for row 0 of step 0, allowed are 1")
    assert len(lines) == 3
    side = "query" if source == "Shapes_i2t" else "target"
    assert all(re.search(rf"{source}-0000\d.tar:\d+: {side}: has an image", line) for line in lines[1:])
