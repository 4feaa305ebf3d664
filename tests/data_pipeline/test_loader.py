from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agff.batch import Batch, Item, ModelInputs
from agff.errors import DataError
from data_pipeline.collate import FixedRows
from data_pipeline.loader import StepBatches, load_batches
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from launcher.prepare import prepare
from tests.drawings import write_drawings


class Encoder:
    """Lengths and a pixel: enough to tell items apart."""

    def num_tokens(self, item: Item) -> int:
        return len(item.text)

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        if any("refuse me" in item.text for item in items):
            raise DataError("this item does not fit")
        pixels = [item.image.getpixel((28, 10)) if item.image else (0, 0, 0) for item in items]
        lengths = [len(item.text) for item in items]
        return {
            "attention_mask": torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths]),
            "pixels": torch.tensor(pixels),
        }


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out", manifest


def batches_of(shards: tuple[Path, Manifest], *, rank: int = 0, world_size: int = 1, **choices: Any) -> StepBatches:
    folder, manifest = shards
    mixture = Mixture(sub_batch_size=4, weights=choices.pop("weights", None))
    return StepBatches(
        plan=Plan(manifest, mixture, seed=0, global_batch_size=8),
        reader=ShardReader(LocalFolder(folder), manifest),
        encode_items=Encoder(),
        rank=rank,
        world_size=world_size,
        chunking=choices.pop("chunking", FixedRows(rows=2)),
        max_bad_in_a_row=choices.pop("max_bad_in_a_row", 3),
    )


def flat(batch: Batch) -> list[Any]:
    chunks = [x.tolist() for chunk in batch.chunks for x in chunk.values()]
    return [
        batch.addresses,
        batch.skipped,
        *(x.tolist() for x in (batch.query_ids_B, batch.target_ids_B, batch.negative_ids_N, batch.order_R)),
        chunks,
    ]


def test_batches_do_not_depend_on_workers_or_on_where_the_run_started(shards: tuple[Path, Manifest]) -> None:
    def run(num_workers: int, start_step: int) -> list[Any]:
        return [
            flat(batch)
            for batch in load_batches(batches_of(shards), start_step=start_step, num_steps=6, num_workers=num_workers)
        ]

    expected = run(0, 0)
    assert len(expected) == 6
    assert run(2, 0) == expected
    assert run(1, 4) == expected[4:]


def test_ranks_share_out_one_global_batch_in_equal_chunks(shards: tuple[Path, Manifest]) -> None:
    whole = batches_of(shards)[5]
    parts = [batches_of(shards, rank=rank, world_size=2)[5] for rank in range(2)]
    assert isinstance(whole, Batch)
    assert whole.addresses == tuple(a for part in parts if isinstance(part, Batch) for a in part.addresses)
    for part in parts:
        assert isinstance(part, Batch)
        assert (part.num_pairs, len(part.chunks) - -(-part.num_negatives // 2)) == (4, 4)
        assert part.num_tokens == sum(int(c["attention_mask"].sum()) for c in part.chunks)


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
        assert "bytes that are no image" in message
    for first, second in zip(*runs, strict=True):
        assert isinstance(first, Batch)
        assert isinstance(second, Batch)
        assert flat(first) == flat(second)
        assert not any(address.startswith("Shapes_i2t-00000") for address in first.addresses)
        if first.skipped:
            assert any(address.startswith("Shapes_i2t-0000") for address in first.addresses)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_in_a_row_are_an_error_with_addresses(shards: tuple[Path, Manifest], num_workers: int) -> None:
    damage(shards[0], b"IDAT", b"XXXX")
    batches = load_batches(batches_of(shards, weights={"Shapes_i2t": 1}), start_step=0, num_steps=2, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^4 bad samples in a row for row 0 of step 0.*Shapes_i2t-0000\d.tar:"):
        next(batches)


def test_an_item_that_the_backbone_refuses_is_skipped_with_its_address(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    damage(folder, b"three black square bottom", b"refuse me, this one, yes!")
    seen = [batches_of(shards, weights={"Shapes_i2t": 1})[step] for step in range(4)]
    skipped = [sample.reason for batch in seen if isinstance(batch, Batch) for sample in batch.skipped]
    assert all("this item does not fit" in message and message.startswith("Shapes_i2t-") for message in skipped)
    assert skipped
