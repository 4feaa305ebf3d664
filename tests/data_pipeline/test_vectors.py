"""Vectors of a teacher: they belong to their shards, come with their samples, and are whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from agff.batch import Batch
from agff.errors import ConfigError, DataError
from data_pipeline import vectors_writer
from data_pipeline.convert import prepare
from data_pipeline.loader import load_batches
from data_pipeline.manifest import Manifest
from data_pipeline.vectors import Vectors, open_vectors
from data_pipeline.vectors_writer import Block, LeftOut, VectorsWriter
from tests.data_pipeline.test_loader import batches_of, damage
from tests.drawings import write_drawings
from tests.mmeb import contents

DIM = 3


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out", manifest


def values_of(source: str, start: int, stop: int) -> np.ndarray:
    """(N, 2, DIM): another number for each source, sample, side and coordinate, exact in float16."""
    first = 600.0 * ["Shapes_VQA", "Shapes_i2t", "Shapes_t2i", "Shapes_text"].index(source)
    return first + np.arange(start * 2 * DIM, stop * 2 * DIM, dtype=np.float32).reshape(-1, 2, DIM)


def write_vectors(folder: Path, manifest: Manifest, *, world_size: int = 1, until: int | None = None) -> None:
    """By so many ranks in turn, which are killed after `until` blocks."""
    for rank in range(world_size):
        writer = VectorsWriter(folder, manifest, model="teacher", dim=DIM, batch_size=2)
        for block in itertools.islice(writer.missing_blocks(rank=rank, world_size=world_size), until):
            writer.write(block, values_of(block.source, block.start, block.stop))
    if until is None:
        writer.finish()


def opened(folder: Path, manifest: Manifest) -> Vectors:
    return open_vectors(folder, manifest, sources=manifest.sources)


def test_vectors_are_those_of_their_sample(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = shards
    write_vectors(tmp_path / "v", manifest)
    vectors = opened(tmp_path / "v", manifest)
    for name, source in manifest.sources.items():
        for sample in range(source.num_samples):
            found = vectors.read(name, sample)
            assert found.dtype == np.float32
            assert np.array_equal(found, values_of(name, sample, sample + 1)[0])
    assert vectors.problems(part=0, num_parts=1, shows_progress=False) == []


def test_the_bytes_depend_neither_on_the_ranks_nor_on_interruptions(
    shards: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, manifest = shards
    write_vectors(tmp_path / "whole", manifest)
    monkeypatch.setattr(vectors_writer, "BLOCK", 5)
    write_vectors(tmp_path / "v", manifest, until=3)
    write_vectors(tmp_path / "v", manifest, world_size=3, until=1)
    writer = VectorsWriter(tmp_path / "v", manifest, model="teacher", dim=DIM, batch_size=2)
    missing = writer.missing_blocks(rank=0, world_size=1)
    assert len(missing) == 35 - 3 - 3
    with pytest.raises(DataError, match=rf"v: {len(missing)} blocks are not written, .* same command again"):
        writer.finish()
    with pytest.raises(DataError, match=r"v: they are not complete \(vectors.json is missing\)"):
        opened(tmp_path / "v", manifest)
    write_vectors(tmp_path / "v", manifest, world_size=2)
    assert contents(tmp_path / "v") == contents(tmp_path / "whole")
    again = VectorsWriter(tmp_path / "v", manifest, model="teacher", dim=DIM, batch_size=2)
    assert again.missing_blocks(rank=0, world_size=1) == []


def test_a_joining_that_was_killed_is_done_again(
    shards: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, manifest = shards
    write_vectors(tmp_path / "whole", manifest)
    right, files = vectors_writer.publish, []

    def killed(partial: Path, path: Path) -> None:
        files.append(path)
        if files.count(tmp_path / "v/Shapes_t2i.npy") == 1:
            raise KeyboardInterrupt
        right(partial, path)

    monkeypatch.setattr(vectors_writer, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        write_vectors(tmp_path / "v", manifest)
    monkeypatch.setattr(vectors_writer, "publish", right)
    write_vectors(tmp_path / "v", manifest)
    assert contents(tmp_path / "v") == contents(tmp_path / "whole")


def test_other_vectors_are_never_continued(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = shards
    for until in (2, None):
        write_vectors(tmp_path / "v", manifest, until=until)
        for choices, what in (
            ({"model": "other"}, "model"),
            ({"dim": 4}, "dim"),
            ({"batch_size": 3}, "batch_size"),
            ({"sources": ["Shapes_t2i"]}, "sources"),
        ):
            with pytest.raises(ConfigError, match=rf"v holds vectors with other {what}; remove it"):
                VectorsWriter(
                    tmp_path / "v", manifest, **{"model": "teacher", "dim": DIM, "batch_size": 2, **choices}
                )
    (tmp_path / "v/vectors.json").write_text("{")
    with pytest.raises(ConfigError, match=r"vectors.json is damaged; remove"):
        VectorsWriter(tmp_path / "v", manifest, model="teacher", dim=DIM, batch_size=2)
    (tmp_path / "v/vectors.json").unlink()
    with pytest.raises(ConfigError, match=r"Shapes_VQA.npy exists and vectors.json does not"):
        VectorsWriter(tmp_path / "v", manifest, model="teacher", dim=DIM, batch_size=2)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_a_teacher_that_says_no_number_is_refused_where_it_is_written(
    shards: tuple[Path, Manifest], tmp_path: Path, value: float
) -> None:
    writer = VectorsWriter(tmp_path / "v", shards[1], model="teacher", dim=DIM, batch_size=2)
    block = Block(source="Shapes_t2i", start=4, stop=12)
    values = values_of("Shapes_t2i", 4, 12)
    values[3, 1, 2] = value
    with pytest.raises(DataError, match=r"Shapes_t2i.npy: the vectors of sample 7 hold NaN or infinity"):
        writer.write(block, values)
    with pytest.raises(ValueError, match=r"shape \(8, 2, 2\), expected \(8, 2, 3\)"):
        writer.write(block, values[..., 1:])


def stored(values: np.ndarray) -> Callable[[Path], None]:
    """Put another array in a source's place and tell vectors.json."""

    def change(folder: Path) -> None:
        path = folder / "Shapes_t2i.npy"
        np.save(path, values)
        described(lambda file: file.update(size_bytes=path.stat().st_size))(folder)

    return change


def described(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / "vectors.json").read_text())
        change(values["sources"]["Shapes_t2i"])
        (folder / "vectors.json").write_text(json.dumps(values))

    return apply


def cut(folder: Path) -> None:
    path = folder / "Shapes_t2i.npy"
    path.write_bytes(path.read_bytes()[:-5])


def cut_and_described(folder: Path) -> None:
    cut(folder)
    described(lambda file: file.update(size_bytes=(folder / "Shapes_t2i.npy").stat().st_size))(folder)


GOOD = values_of("Shapes_t2i", 0, 24).astype(np.float16)
UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "other shards": (
        described(lambda file: file.update(shards="0" * 64)),
        "made for other shards of Shapes_t2i",
    ),
    "another length": (
        described(lambda file: file.update(samples=23)),
        "vectors of 23 samples, Shapes_t2i has 24",
    ),
    "cut short": (cut, r"t2i.npy: has \d+ bytes, vectors.json says \d+"),
    "cut short and described so": (cut_and_described, "t2i.npy: cannot be read: "),
    "fewer rows than described": (stored(GOOD[:-1]), r"holds \(23, 2, 3\) float16, it must be \(24, 2, 3\)"),
    "another width": (stored(GOOD[..., 1:]), r"holds \(24, 2, 2\) float16, it must be \(24, 2, 3\)"),
    "one side": (stored(GOOD[:, :1]), r"holds \(24, 1, 3\) float16"),
    "another type": (stored(GOOD.astype(np.float32)), r"holds \(24, 2, 3\) float32"),
    "a pickle": (stored(np.array([{}] * 24)), "t2i.npy: cannot be read: .*Python objects"),
    "missing": (
        lambda folder: (folder / "Shapes_t2i.npy").unlink(),
        "t2i.npy: cannot be read: .*No such file",
    ),
    "no description": (lambda folder: (folder / "vectors.json").unlink(), "no vectors here"),
    "no JSON": (lambda folder: (folder / "vectors.json").write_text("["), "vectors.json: cannot be read: "),
    "a field missing": (described(lambda file: file.pop("sides")), "vectors.json: cannot be read: "),
    "another format": (
        lambda folder: (folder / "vectors.json").write_text('{"format": 9}'),
        "vectors.json: format 9 is not 1",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_vectors_that_are_not_those_of_the_shards_are_refused_when_they_are_opened(
    shards: tuple[Path, Manifest], tmp_path: Path, case: str
) -> None:
    write_vectors(tmp_path / "v", shards[1])
    opened(tmp_path / "v", shards[1])
    change, message = UNUSABLE[case]
    change(tmp_path / "v")
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path / "v", shards[1])
    assert "make them for these shards with launcher/embed.py" in str(caught.value)


def test_every_source_that_cannot_be_used_is_named(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = shards
    writer = VectorsWriter(
        tmp_path / "v", manifest, model="teacher", dim=DIM, batch_size=2, sources=["Shapes_t2i"]
    )
    for block in writer.missing_blocks(rank=0, world_size=1):
        writer.write(block, values_of(block.source, block.start, block.stop))
    writer.finish()
    open_vectors(tmp_path / "v", manifest, sources=["Shapes_t2i"])
    cut(tmp_path / "v")
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "v", manifest)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0] == (
        f"{tmp_path}/v: no vectors of source Shapes_VQA; make them for these shards with launcher/embed.py, "
        "or leave it out with data.weights"
    )
    with pytest.raises(DataError, match=r"vectors are read from a local folder only; copy them to one"):
        open_vectors(Path("s3://bucket/vectors"), manifest, sources=manifest.sources)


def test_changed_bytes_and_what_is_not_finite_are_found_before_training(
    shards: tuple[Path, Manifest], tmp_path: Path
) -> None:
    manifest = shards[1]
    write_vectors(tmp_path / "v", manifest)
    for name, sample in (("Shapes_VQA", 2), ("Shapes_t2i", 5)):
        array = np.load(tmp_path / f"v/{name}.npy", mmap_mode="r+")
        array[sample, 1, 0] = np.nan
        array.flush()
    vectors = opened(tmp_path / "v", manifest)
    found = vectors.problems(part=0, num_parts=1, shows_progress=False)
    assert len(found) == 2
    assert all("SHA-256 is" in line and "make them for these shards" in line for line in found)
    parts = [vectors.problems(part=part, num_parts=2, shows_progress=False) for part in range(2)]
    assert sorted(line for part in parts for line in part) == found
    # a foreign writer whose hash is right
    digests = {name: vectors_writer.sha256_of(tmp_path / f"v/{name}.npy") for name in manifest.sources}
    values = json.loads((tmp_path / "v/vectors.json").read_text())
    for name, digest in digests.items():
        values["sources"][name]["sha256"] = digest
    (tmp_path / "v/vectors.json").write_text(json.dumps(values))
    vectors = opened(tmp_path / "v", manifest)
    assert vectors.digests == digests
    found = vectors.problems(part=0, num_parts=1, shows_progress=False)
    assert [line.partition(" hold ")[0] for line in found] == [
        f"{tmp_path}/v/Shapes_VQA.npy: the vectors of sample 2",
        f"{tmp_path}/v/Shapes_t2i.npy: the vectors of sample 5",
    ]
    with pytest.raises(DataError, match=r"Shapes_t2i.npy: the vectors of sample 5 hold NaN"):
        vectors.read("Shapes_t2i", 5)


def expected_vectors(batch: Batch) -> torch.Tensor:
    """By the addresses of its pairs, whose keys are rows and here samples too."""
    rows = [(address.split("-")[0], int(address.rpartition(":")[2])) for address in batch.addresses]
    return torch.tensor(np.stack([values_of(source, row, row + 1)[0] for source, row in rows]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_pair_of_a_batch_comes_with_its_vectors_one_that_was_drawn_instead_too(
    shards: tuple[Path, Manifest], tmp_path: Path, num_workers: int
) -> None:
    folder, manifest = shards
    write_vectors(tmp_path / "v", manifest)
    damage(folder, b"IDAT", b"XXXX", shard="*-00000")
    batches = batches_of(shards, max_bad_in_a_row=50, vectors=opened(tmp_path / "v", manifest))
    num_skipped = 0
    for batch in load_batches(batches, start_step=0, num_steps=4, num_workers=num_workers):
        num_skipped += len(batch.skipped)
        found = [batch.pair_data[name] for name in ("query_teacher", "target_teacher")]
        assert torch.equal(torch.stack(found, dim=1), expected_vectors(batch))
    assert num_skipped


def test_a_vector_that_is_not_finite_ends_the_run_and_is_not_skipped(
    shards: tuple[Path, Manifest], tmp_path: Path
) -> None:
    write_vectors(tmp_path / "v", shards[1])
    for path in (tmp_path / "v").glob("*.npy"):
        array = np.load(path, mmap_mode="r+")
        array[:] = np.nan
        array.flush()
    batches = batches_of(shards, vectors=opened(tmp_path / "v", shards[1]))
    found = batches[0]
    assert isinstance(found, DataError)
    assert "hold NaN or infinity" in str(found)
    assert "bad samples in a row" not in str(found)


@pytest.mark.parametrize("side", [0, 1])
def test_a_sample_that_the_teacher_could_not_take_is_passed_over_by_every_rank_alike(
    shards: tuple[Path, Manifest], tmp_path: Path, side: int
) -> None:
    write_vectors(tmp_path / "v", shards[1])
    for path in (tmp_path / "v").glob("*.npy"):
        array = np.load(path, mmap_mode="r+")
        array[::2, side] = 0  # as launcher/embed.py writes one
        array.flush()
    found = [
        list(load_batches(batches, start_step=0, num_steps=3, num_workers=num_workers))
        for num_workers in (0, 1)
        for batches in [batches_of(shards, max_bad_in_a_row=50, vectors=opened(tmp_path / "v", shards[1]))]
    ]
    assert any(batch.skipped for batch in found[0])
    for batch, again in zip(*found, strict=True):
        assert batch.addresses == again.addresses
        assert all("the teacher has no vector of a side" in skipped.reason for skipped in batch.skipped)
        assert batch.pair_data[("query_teacher", "target_teacher")[side]].any(dim=1).all()


def test_a_source_without_samples_needs_no_vectors(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    manifest = shards[1]
    empty = dataclasses.replace(manifest.sources["Shapes_t2i"], shards=())
    manifest = Manifest(sources={**manifest.sources, "Shapes_t2i": empty}, settings={})
    write_vectors(tmp_path / "v", manifest)
    open_vectors(tmp_path / "v", manifest, sources=["Shapes_VQA", "Shapes_i2t", "Shapes_text"])


def test_what_was_left_out_before_a_kill_is_said_at_the_end(
    shards: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_writer, "BLOCK", 5)
    for share in (slice(0, 2), slice(2, None)):
        writer = VectorsWriter(
            tmp_path / "v", shards[1], model="t", dim=DIM, batch_size=2, sources=["Shapes_t2i"]
        )
        for block in writer.missing_blocks(rank=0, world_size=1)[: share.stop]:
            left_out = LeftOut(unusable=(f"sample {block.start}",), num_cut=1)
            writer.write(block, values_of(block.source, block.start, block.stop), left_out)
    found = writer.finish()
    assert found.num_cut == len(found.unusable) > 2
    assert found.unusable[:2] == ("sample 0", "sample 5")
