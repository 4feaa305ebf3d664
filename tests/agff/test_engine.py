"""Which device a rank takes. What an engine computes: test_step.py and test_checkpoint.py."""

from __future__ import annotations

import os
from types import SimpleNamespace

import deepspeed
import pytest

from agff.engine import start_process_group


@pytest.mark.parametrize(("num_visible", "local_rank", "expected"), [(8, 3, 3), (1, 3, 0), (1, 0, 0)])
def test_a_rank_that_sees_one_device_alone_takes_it(
    monkeypatch: pytest.MonkeyPatch, num_visible: int, local_rank: int, expected: int
) -> None:
    """With Slurm's --gpus-per-task each rank sees one device, as number 0."""
    taken: list[int] = []
    accelerator = SimpleNamespace(
        device_name=lambda index=None: "cuda" if index is None else f"cuda:{index}",
        device_count=lambda: num_visible,
        communication_backend_name=lambda: "nccl",
        set_device=taken.append,
    )
    monkeypatch.setattr("agff.engine.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(
        deepspeed, "init_distributed", lambda **_: taken.append(int(os.environ["LOCAL_RANK"]))
    )
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed asserts that they are equal
        monkeypatch.setenv(name, str(local_rank))
    device = start_process_group(local_rank)
    assert device.index == expected
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(expected)
    assert taken == [expected, expected], "DeepSpeed's, which it reads from LOCAL_RANK, and ours"
