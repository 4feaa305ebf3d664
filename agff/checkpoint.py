"""Checkpoints of a run: ZeRO's partitions, the step and the random states; complete or absent, never half.

<run>/checkpoints/step-000100/           DeepSpeed's files, written under `step-000100.partial` and then renamed
                              random-00000.pt ...   each rank's random state
                              state.json            step, ranks, description of the data plan; written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agff.collectives import rank, world_size
from agff.engine import Engine
from agff.grad_cache import random_state, set_random_state

STATE_FILE = "state.json"


def checkpoint_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def latest_step(run: Path) -> int | None:
    """Step of the newest complete checkpoint; None when there is none. Half-written ones do not count."""
    steps = [
        int(match[1])
        for folder in checkpoint_folder(run).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / STATE_FILE).exists()
    ]
    return max(steps, default=None)


def save_checkpoint(engine: Engine, run: Path, *, step: int, state: Mapping[str, Any], trainable_only: bool) -> None:
    """Write a checkpoint of `step` completed steps. Collective; returns when it is complete on disk.

    state: JSON values stored beside it. trainable_only: leave frozen parameters out (they are the backbone folder's).
    """
    folder, name = checkpoint_folder(run), _name(step)
    partial = folder / f"{name}.partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder / name, ignore_errors=True)
    dist.barrier()
    engine.deepspeed.save_checkpoint(
        str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=trainable_only
    )
    torch.save(random_state(), partial / f"random-{rank():05d}.pt")
    dist.barrier()
    if rank() == 0:
        text = json.dumps({"step": step, "world_size": world_size(), **state}, indent=1)
        (partial / STATE_FILE).write_text(text)
        for path in partial.iterdir():
            _sync(path)
        partial.rename(folder / name)
        _sync(folder)
    dist.barrier()


def read_state(run: Path, step: int) -> dict[str, Any]:
    """The JSON state stored with a checkpoint."""
    return json.loads((checkpoint_folder(run) / _name(step) / STATE_FILE).read_text())


def restore_checkpoint(engine: Engine, run: Path, *, step: int, trainable_only: bool) -> None:
    """Load parameters, optimizer, schedule and random state, so that the run continues bit for bit. Collective.

    The number of ranks must be the one that saved (`state.json` tells it).
    """
    folder = checkpoint_folder(run)
    engine.deepspeed.load_checkpoint(str(folder), tag=_name(step), load_module_strict=not trainable_only)
    state = torch.load(folder / _name(step) / f"random-{rank():05d}.pt", weights_only=True)
    set_random_state(state)


def consolidated_weights(run: Path, *, step: int) -> dict[str, Tensor]:
    """The model's parameters in float32 on the CPU, put together from the ZeRO partitions of a checkpoint.

    Reads DeepSpeed's own files, which are pickles: only for runs you trust. Frozen parameters that were left out are absent.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint_folder(run)), tag=_name(step))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
