"""Checkpoints of a run: ZeRO's partitions, the step and the random states; complete or absent, never half.

<run>/checkpoints/step-000100/           DeepSpeed's files, written under `step-000100.partial` and then renamed
                              random-00000.pt ...   each rank's random state
                              state.json            step, ranks, description of the data plan; written last
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agff.collectives import gather_objects, max_over_ranks, rank, world_size
from agff.engine import Engine
from agff.errors import CheckpointError
from agff.grad_cache import random_state, set_random_state

STATE_FILE = "state.json"

log = logging.getLogger(__name__)


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
    """Load parameters, optimizer, schedule and random state, so that the run continues. Collective.

    With the number of ranks that saved (`state.json` tells it) it continues bit for bit. With another one the partitions are
    put together and cut anew; then the weights and moments are the same, sums are taken in another order, and ranks that did
    not exist before draw their dropout from the step and their number.
    """
    folder, saved_by = checkpoint_folder(run), read_state(run, step)["world_size"]
    if saved_by == world_size():
        engine.deepspeed.load_checkpoint(str(folder), tag=_name(step), load_module_strict=not trainable_only)
    else:
        _restore_repartitioned(engine, folder, _name(step), trainable_only=trainable_only)
    if rank() < saved_by:
        set_random_state(torch.load(folder / _name(step) / f"random-{rank():05d}.pt", weights_only=True))
    else:
        torch.manual_seed(step * 2**20 + rank())


def _restore_repartitioned(engine: Engine, folder: Path, name: str, *, trainable_only: bool) -> None:
    """Through DeepSpeed's universal checkpoint, a temporary copy beside the checkpoint. Collective."""
    universal = folder / f"{name}.universal"
    conversion = None
    if rank() == 0:
        shutil.rmtree(universal, ignore_errors=True)
        log.warning("%s: cutting the checkpoint anew for %d ranks", folder / name, world_size())
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / name), "--output_folder", str(universal)]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        conversion = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = ""
    exit_code = None
    while True:  # the ranks keep meeting, so that none of them gives up on the others
        if conversion is not None and exit_code is None:
            try:
                output, _ = conversion.communicate(timeout=1)
                exit_code = conversion.returncode
            except subprocess.TimeoutExpired:
                pass
        done, failed = max_over_ranks([exit_code is not None, bool(exit_code)], device=engine.device)
        if done:
            break
    if failed:
        reason = next(text for text in gather_objects(output[-2000:]) if text)
        raise CheckpointError(f"{folder / name}: cannot be cut anew for {world_size()} ranks: {reason}")
    config = engine.deepspeed._config
    config.load_universal_checkpoint = True  # for this load only: left on, later saves break
    try:
        engine.deepspeed.load_checkpoint(str(folder), tag=universal.name, load_module_strict=not trainable_only)
    finally:
        config.load_universal_checkpoint = False
    dist.barrier()
    if rank() == 0:
        shutil.rmtree(universal)
        (folder / "latest_universal").unlink(missing_ok=True)


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
