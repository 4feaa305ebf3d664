"""What all ranks agree on before the first step, where the nodes have copies of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

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
    for said in run_ranks(said_of_copies, own, world_size=3):
        assert said.startswith(f"{os.uname().nodename}: {damaged[0]}: SHA-256 of the shard is")
        assert said.endswith(f"(and {len(damaged) - 5} more)"), "one rank looked at all of them"
