"""Saving and restoring checkpoints: ZeRO's partitions, the step and the random states. Collective."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from agff.checkpoint_folder import (
    STATE_FILE,
    check_checkpoint,
    checkpoint_folder,
    checkpoint_name,
    complete_steps,
    read_state,
    remove_checkpoint,
)
from agff.collectives import gather_objects, max_over_ranks, rank, world_size
from agff.engine import Engine
from agff.errors import CheckpointError
from agff.files import file_fingerprint, sync
from agff.grad_cache import random_state, set_random_state

LATE_FILES_S = 60
"""How long a file that another machine wrote may stay invisible."""
log = logging.getLogger(__name__)


def newest_intact_step(run: Path, *, device: torch.device) -> int | None:
    """Step of the newest checkpoint whose files are all as they were written; None when there is none at all.
    Collective; rank 0 shows a progress bar when hashing takes long.

    Damaged ones are passed over with a loud message and renamed `step-N.damaged`: they no longer count, and
    cost no good one its place. Raises CheckpointError when every one is damaged; then all stay as they are.
    """
    steps = gather_objects(complete_steps(run))[0]  # the ranks may not see the same folder yet
    for index, step in enumerate(steps):
        problems = check_checkpoint(
            run, step, part=rank(), num_parts=world_size(), shows_progress=rank() == 0
        )
        if not max_over_ranks([bool(problems)], device=device)[0]:
            if rank() == 0:
                for damaged in (
                    checkpoint_folder(run) / checkpoint_name(damaged) for damaged in steps[:index]
                ):
                    shutil.rmtree(f"{damaged}.damaged", ignore_errors=True)
                    # it was removed, and this machine did not know yet
                    with contextlib.suppress(FileNotFoundError):
                        damaged.rename(f"{damaged}.damaged")
                        log.error("set aside as %s.damaged", damaged)
            dist.barrier()
            return step
        for problem in (problem for found in gather_objects(problems) for problem in found):
            if rank() == 0:
                log.error("DAMAGED CHECKPOINT, going back to the one before it: %s", problem)
    if steps:
        raise CheckpointError(
            f"{checkpoint_folder(run)}: all of the {len(steps)} checkpoints are damaged or cannot be read "
            "(listed above); repair the file system, or start again with another --run_dir"
        ).shared()
    return None


def save_checkpoint(
    engine: Engine, run: Path, *, step: int, state: Mapping[str, Any], trainable_only: bool
) -> None:
    """Write a checkpoint of `step` completed steps. Collective; returns when it is complete on disk.

    state: JSON values stored beside it. trainable_only: leave frozen parameters out (they are the backbone
    folder's). Written under a temporary name; each rank then syncs and hashes its share of the files,
    state.json with the hashes is written last, and the folder gets its name.
    """
    folder, name = checkpoint_folder(run), checkpoint_name(step)
    partial = folder / f"{name}.partial"
    if rank() == 0:
        for leftover in (partial, folder / name):
            remove_checkpoint(leftover)
    dist.barrier()
    engine.deepspeed.save_checkpoint(
        str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=trainable_only
    )
    torch.save(random_state(), partial / f"random-{rank():05d}.pt")
    dist.barrier()
    names = _written_files(partial, zero_stage=engine.deepspeed.zero_optimization_stage())
    own = [partial / name for name in names[rank() :: world_size()]]
    for path in own:
        sync(path)
    hashes = gather_objects({str(path.relative_to(partial)): file_fingerprint(path) for path in own})
    if rank() == 0:
        files = {name: value for found in hashes for name, value in found.items()}
        text = json.dumps({"step": step, "world_size": world_size(), "files": files, **state}, indent=1)
        (partial / STATE_FILE).write_text(text)
        sync(partial / STATE_FILE)
        sync(partial)
        partial.rename(folder / name)
        sync(folder)
    dist.barrier()


def _written_files(partial: Path, *, zero_stage: int) -> list[str]:
    """Names of the files that all ranks wrote, the same list on every rank. Collective.

    A network file system may show the files of other machines late, so rank 0 looks until those of each rank
    are there.
    """
    names: list[str] = []
    if rank() == 0:
        kinds = ["random-*.pt", "*_optim_states.pt"] + ["zero_pp_rank_*_model_states.pt"] * (zero_stage == 3)
        deadline = time.monotonic() + LATE_FILES_S
        while True:
            names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
            num_complete = min(sum(fnmatch(name, kind) for name in names) for kind in kinds)
            if num_complete >= world_size() or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        names = names if num_complete >= world_size() else []
    names = gather_objects(names)[0]
    if not names:
        raise CheckpointError(
            f"{partial}: rank 0 does not see the files of all {world_size()} ranks within {LATE_FILES_S} s; "
            "run_dir must be on a file system that all machines share"
        ).shared()
    return names


def restore_checkpoint(engine: Engine, run: Path, *, step: int, trainable_only: bool) -> None:
    """Load parameters, optimizer, schedule and random state, so that the run continues. Collective.

    With the number of ranks that saved (it is in `state.json`) it continues bit for bit. With another one the
    partitions are resharded; then the weights and moments are the same, sums are taken in another order, and
    ranks that did not exist before draw their dropout from the step and their number.
    """
    folder, saved_by = checkpoint_folder(run), read_state(run, step)["world_size"]
    if saved_by == world_size():
        _load(engine, folder, checkpoint_name(step), trainable_only=trainable_only)
    else:
        _restore_repartitioned(engine, folder, checkpoint_name(step), trainable_only=trainable_only)
    if rank() < saved_by:
        set_random_state(
            torch.load(folder / checkpoint_name(step) / f"random-{rank():05d}.pt", weights_only=True)
        )
    else:
        torch.manual_seed(step * 2**20 + rank())


def _restore_repartitioned(engine: Engine, folder: Path, name: str, *, trainable_only: bool) -> None:
    """Through DeepSpeed's universal checkpoint, a temporary copy beside the checkpoint. Collective."""
    universal = folder / f"{name}.universal"
    conversion = None
    output, exit_code = "", None
    if rank() == 0:
        shutil.rmtree(universal, ignore_errors=True)
        log.warning("%s: resharding the checkpoint for %d ranks", folder / name, world_size())
        # a request to stop reaches it too; it is done soon
        command = [
            "sh",
            "-c",
            'trap "" USR1 TERM; exec "$@"',
            "sh",
        ]
        command += [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / name), "--output_folder", str(universal)]
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        try:
            conversion = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            output, exit_code = str(error), -1
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
        reason = gather_objects(output[-2000:] or f"exit code {exit_code}")[0]
        raise CheckpointError(
            f"{folder / name}: cannot be resharded for {world_size()} ranks: {reason}"
        ).shared()
    config = engine.deepspeed._config
    config.load_universal_checkpoint = True  # for this load only: left on, later saves break
    try:
        _load(engine, folder, universal.name, trainable_only=trainable_only)
    finally:
        config.load_universal_checkpoint = False
    for parameter, state in engine.deepspeed.optimizer.optimizer.state.items():
        # DeepSpeed 0.19.8 gives all groups of a rank one counter, on the CPU: each would count for all
        state["step"] = state["step"].clone().to(parameter.device)
    dist.barrier()
    if rank() == 0:
        shutil.rmtree(universal)
        (folder / "latest_universal").unlink(missing_ok=True)


def _load(engine: Engine, folder: Path, name: str, *, trainable_only: bool) -> None:
    path, _ = engine.deepspeed.load_checkpoint(str(folder), tag=name, load_module_strict=not trainable_only)
    if path is None:
        raise CheckpointError(f"{folder / name}: DeepSpeed found nothing to load there")
