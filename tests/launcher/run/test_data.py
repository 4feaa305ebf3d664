"""What all ranks agree on before the first step, where the nodes have copies of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import agff.files
from agff.errors import ConfigError, DataError
from agff.objectives.contrastive import Contrastive
from data_pipeline.convert import prepare
from data_pipeline.manifest import read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.storage import LocalFolder
from data_pipeline.vectors import open_vectors
from data_pipeline.vectors_writer import VectorsWriter
from launcher.command_line import parse_train_arguments
from launcher.run.data import RunData, check_shards_together, open_data
from tests.drawings import write_drawings
from tests.ranks import run_ranks


def found_in_copies(cases: list[list[tuple[Path, Path | None]]]) -> list[str]:
    """What check_shards_together raises on this rank in each case, of (shards, vectors) a rank; "" for
    nothing."""
    found = []
    for folders in cases:
        shards, vectors = folders[dist.get_rank()]
        folder = LocalFolder(shards)
        manifest = read_manifest(folder)
        plan = Plan(manifest, Mixture(sub_batch_size=4), seed=0, global_batch_size=8)
        opened = open_vectors(vectors, manifest, sources=plan.source_names) if vectors else None
        try:
            data = RunData(folder=folder, manifest=manifest, plan=plan, vectors=opened)
            check_shards_together(data, hashes=True)
            found.append("")
        except DataError as error:
            found.append(str(error))
    return found


@pytest.mark.timeout(300)
def test_every_copy_of_the_shards_is_read_whole_by_the_ranks_that_see_it(tmp_path: Path) -> None:
    whole, copy, damaged, other = (tmp_path / name for name in ("whole", "copy", "damaged", "other"))
    prepare(write_drawings(tmp_path / "d").mmeb, whole, rows_per_shard=10)
    prepare(tmp_path / "d/mmeb", other, rows_per_shard=20)
    shutil.copytree(whole, copy)
    shutil.copytree(whole, damaged)
    shards = sorted(damaged.glob("*/*.tar"))
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    assert len(shards) > 9
    cases = [[whole, whole, copy], [whole, whole, damaged], [whole, other, other]]
    without_vectors = [[(folder, None) for folder in case] for case in cases]
    for rank, found in enumerate(run_ranks(found_in_copies, without_vectors, world_size=3)):
        assert found[0] == ""
        first, *lines = found[1].splitlines()
        assert first == f"{cases[1][rank]}: {len(shards)} files are not those of the manifest:"
        for line, shard in zip(lines, shards, strict=True):
            assert line.startswith(f"  {os.uname().nodename}: {shard}: SHA-256 of the shard is")
        assert "2 ranks see other shards there than rank 0: 1, 2; copy the same" in found[2]


@pytest.mark.timeout(300)
def test_all_ranks_have_the_same_vectors_and_they_are_as_they_were_written(tmp_path: Path) -> None:
    shards, good, other, bad = (tmp_path / name for name in ("shards", "good", "other", "bad"))
    manifest = prepare(write_drawings(tmp_path / "d").mmeb, shards, rows_per_shard=10)
    for folder, seed in ((good, 0), (other, 1)):
        writer = VectorsWriter(folder, manifest, model=f"teacher {seed}", dim=4, batch_size=2)
        for block in writer.missing_blocks(rank=0, world_size=1):
            writer.write(block, np.full((block.stop - block.start, 2, 4), seed, dtype=np.float32))
        writer.finish()
    shutil.copytree(good, bad)
    for path in bad.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    cases = [
        [(shards, good)] * 2,
        [(shards, good), (shards, bad)],
        [(shards, bad)] * 2,
        [(shards, good), (shards, other)],
    ]
    names = sorted(manifest.sources)
    for found in run_ranks(found_in_copies, cases, world_size=2):
        assert found[0] == ""
        for text, node in ((found[1], f"{os.uname().nodename}: "), (found[2], "")):
            lines = sorted(text.splitlines())
            assert len(lines) == len(names)
            for line, name in zip(lines, names, strict=True):
                assert line.startswith(f"{node}{bad}/{name}.npy: SHA-256 is ")
        assert "1 ranks see other shards or vectors there than rank 0: 1; copy the same" in found[3]


def test_an_objective_that_needs_vectors_is_refused_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "a", rows_per_shard=10)
    shards = ["--data.shards", str(tmp_path / "a"), "--data.weights", "null", "--data.sub_batch_size", "8"]
    config = parse_train_arguments(shards).config
    assert open_data(config).vectors is None
    monkeypatch.setattr(Contrastive, "needs_vectors", True)
    with pytest.raises(ConfigError, match=r"learns from a teacher's vectors, and data.vectors is not given"):
        open_data(config)
    writer = VectorsWriter(
        tmp_path / "v", read_manifest(LocalFolder(tmp_path / "a")), model="teacher", dim=2, batch_size=2
    )
    for block in writer.missing_blocks(rank=0, world_size=1):
        writer.write(block, np.zeros((block.stop - block.start, 2, 2), dtype=np.float32))
    writer.finish()
    data = open_data(parse_train_arguments([*shards, "--data.vectors", str(tmp_path / "v")]).config)
    assert data.vectors is not None
    assert data.description == {**data.plan.description, "vectors": data.vectors.digests}
    with pytest.raises(DataError, match=r"none: no vectors here"):
        open_data(parse_train_arguments([*shards, "--data.vectors", str(tmp_path / "none")]).config)


def test_hashing_the_shards_is_shown_when_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "a", rows_per_shard=10)
    folder = LocalFolder(tmp_path / "a")
    manifest = read_manifest(folder)
    plan = Plan(manifest, Mixture(sub_batch_size=4), seed=0, global_batch_size=8)
    data = RunData(folder=folder, manifest=manifest, plan=plan)
    capsys.readouterr()
    check_shards_together(data, hashes=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(agff.files, "SILENT_S", 0)
    check_shards_together(data, hashes=False)
    assert capsys.readouterr().err == "", "sizes are compared in no time"
    check_shards_together(data, hashes=True)
    assert "check shards: 100%" in capsys.readouterr().err
