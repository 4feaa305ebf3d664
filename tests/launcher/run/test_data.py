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


def found_in_copies(cases: list[list[Path]]) -> list[str]:
    """What each case raises on rank r, which sees its `folders[r]`; "" when nothing is wrong."""
    found = []
    for folders in cases:
        folder = LocalFolder(folders[dist.get_rank()])
        manifest = read_manifest(folder)
        plan = Plan(manifest, Mixture(sub_batch_size=4), seed=0, global_batch_size=8)
        data = RunData(folder=folder, manifest=manifest, plan=plan)
        try:
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
    for rank, found in enumerate(run_ranks(found_in_copies, cases, world_size=3)):
        assert found[0] == ""
        first, *lines = found[1].splitlines()
        assert first == f"{cases[1][rank]}: {len(shards)} files are not those of the manifest:"
        for line, shard in zip(lines, shards, strict=True):
            assert line.startswith(f"  {os.uname().nodename}: {shard}: SHA-256 of the shard is")
        assert "2 ranks see other shards there than rank 0: 1, 2; copy the same" in found[2]


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
