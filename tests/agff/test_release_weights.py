"""What is written is what is read back, file by file; and one tensor at a time is in memory."""

from __future__ import annotations

import json
import os
import time
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agff.errors import CheckpointError
from agff.lazy_tensor import LazyTensor, of_tensor
from agff.release_weights import check_written, write_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(40.0), "c": torch.ones(1), "d": torch.ones(2)}


@pytest.mark.parametrize(
    ("shard_bytes", "shards"),
    [
        (None, ["abcd"]),
        (196, ["abcd"]),
        (195, ["abc", "d"]),
        (28, ["a", "b", "cd"]),  # b is larger than a file should be
        (1, ["a", "b", "c", "d"]),
    ],
)
def test_shards_hold_each_tensor_once_and_their_index_says_where(
    tmp_path: Path, shard_bytes: int | None, shards: list[str]
) -> None:
    lazy = {name: of_tensor(tensor) for name, tensor in TENSORS.items()}
    check_written(write_weights(tmp_path, lazy, dtype=torch.float32, shard_bytes=shard_bytes))
    files = sorted(tmp_path.glob("*.safetensors"))
    found = [load_file(file) for file in files]
    assert ["".join(sorted(each)) for each in found] == shards
    assert all(torch.equal(each[name], TENSORS[name]) for each in found for name in each)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if index.exists():
        values = json.loads(index.read_text())
        assert values["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        assert values["weight_map"] == {
            name: file.name for file, each in zip(files, found, strict=True) for name in each
        }


def test_what_another_program_changed_meanwhile_is_named(tmp_path: Path) -> None:
    written = write_weights(
        tmp_path, {name: of_tensor(tensor) for name, tensor in TENSORS.items()}, dtype=torch.float32
    )
    path = tmp_path / "model.safetensors"
    changes: dict[str, dict[str, Any]] = {
        "b read back differs from what was written: CRC-32 ": TENSORS | {"b": TENSORS["b"] + 1},
        "c read back differs from what was written: cannot be read": {name: TENSORS[name] for name in "abd"},
        "holds e, which was not written": TENSORS | {"e": torch.ones(1)},
    }
    for says, tensors in changes.items():
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=f"model.safetensors: {says}"):
            check_written(written)


def test_a_tensor_is_gone_when_the_next_one_is_made(tmp_path: Path) -> None:
    """So merged adapters, which take two in the making, are two at most. Memory of numpy's shows when it is
    given back: a tensor's may outlive its object."""
    made: list[weakref.ref[Any]] = []

    def make() -> Tensor:
        deadline = time.monotonic() + 5  # the thread that made its hash lets go of it when it gets its turn
        while any(each() is not None for each in made) and time.monotonic() < deadline:
            os.sched_yield()
        assert all(each() is None for each in made)
        memory = numpy.ones(3, dtype=numpy.float32)
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    lazy = {name: LazyTensor(torch.Size([3]), make) for name in "abcd"}
    write_weights(tmp_path, lazy, dtype=torch.float32)
    assert len(made) == 4
