"""What all ranks agree on before the first step, where the nodes have copies of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

import agff.files
from agff.errors import DataError
from data_pipeline.convert import prepare
from data_pipeline.manifest import read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.storage import LocalFolder
from launcher.run.data import RunData, check_shards_together
from tests.drawings import write_drawings
from tests.ranks import run_ranks


def said_of_copies(folders: list[Path]) -> str:
    """What rank r says, which sees `folders[r]`."""
    folder = LocalFolder(folders[dist.get_rank()])
    manifest = read_manifest(folder)
    plan = Plan(manifest, Mixture(sub_batch_size=4), seed=0, global_batch_size=8)
    try:
        check_shards_together(RunData(folder=folder, manifest=manifest, plan=plan), hashes=True)
    except DataError as error:
        return str(error)
    return "well"


@pytest.mark.timeout(300)
def test_every_copy_of_the_shards_is_looked_at_whole_and_by_the_ranks_that_see_it(tmp_path: Path) -> None:
    prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "a", rows_per_shard=10)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    own = [tmp_path / "a", tmp_path / "a", tmp_path / "b"]
    assert run_ranks(said_of_copies, own, world_size=3) == ["well"] * 3
    damaged = sorted((tmp_path / "b").glob("*/*.tar"))
    for shard in damaged:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    assert len(damaged) > 9
    for folder, said in zip(own, run_ranks(said_of_copies, own, world_size=3), strict=True):
        first, *lines = said.splitlines()
        assert first == f"{folder}: {len(damaged)} files are not those of the manifest:"
        for line, shard in zip(lines, damaged, strict=True):
            assert line.startswith(f"  {os.uname().nodename}: {shard}: SHA-256 of the shard is")


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
