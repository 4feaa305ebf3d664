"""A run's folder: whose it is, how far it got."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from agff.checkpoint_folder import STATE_FILE, checkpoint_folder, checkpoint_name, read_state
from agff.collectives import raise_together, rank
from agff.errors import AgffError, CheckpointError, ConfigError
from data_pipeline.plan_changes import plan_changes
from launcher.run.changes import differences
from launcher.run.config import ResolvedRun, as_dict
from launcher.run.config_file import (
    CONFIG_FILE,
    DEEPSPEED_FILE,
    stored_deepspeed,
    stored_values,
    with_paths,
)

LOCK_FILE = ".lock"
WRITTEN_FIRST = (LOCK_FILE, DEEPSPEED_FILE, f"{DEEPSPEED_FILE}.*.partial", f"{CONFIG_FILE}.*.partial")
"""What a start that was killed may leave in a folder that is no run yet."""

log = logging.getLogger(__name__)


def check_run_folder(run: ResolvedRun) -> None:
    """Reads only. Raises ConfigError when the folder holds something else, or a run of another
    configuration."""
    folder = run.run_dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another --run_dir")
    if not folder.exists() or all(any(map(path.match, WRITTEN_FIRST)) for path in folder.iterdir()):
        if run.config.run_dir is None:
            _warn_of_another_start(run)
        return
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"{folder} exists and holds no run ({CONFIG_FILE} is missing); choose another --run_dir"
        )
    old, new = (
        with_paths(values, os.path.realpath) for values in (stored_values(folder), as_dict(run.config))
    )
    changed = differences(old, new)
    changed += differences(stored_deepspeed(folder), run.deepspeed, "deepspeed.")
    if changed:
        raise ConfigError(
            f"{folder} belongs to another configuration: {'; '.join(changed)}. "
            "Give the old settings to continue that run, or another --run_dir to start a new one"
        )


def _warn_of_another_start(run: ResolvedRun) -> None:
    """A run of this name that was started with another DeepSpeed file would not be continued."""
    others = [
        str(path.parent)
        for path in sorted(run.run_dir.parent.glob(f"{run.config.name}-*/checkpoints"))
        if path.parent != run.run_dir
    ]
    if others and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s is new and starts at step 0; %s %s checkpoints of another DeepSpeed file: to continue "
            "that run, give its --deepspeed",
            run.run_dir,
            " and ".join(others),
            "hold" if len(others) > 1 else "holds",
        )


def check_data_plan(run: ResolvedRun, data_plan: Mapping[str, Any], *, step: int) -> None:
    """Whether the run can continue after `step` steps. Reads only. Collective.

    data_plan: `RunData.description` of this rank. Raises the same error on every rank: ConfigError
    when it was another one on any of them, and data.accept_changes is not set; CheckpointError when the
    checkpoint cannot say which it was. Warns when only the ranks' rows of a global batch were others.
    """
    problem: AgffError | None = None
    try:
        _check_data_plan(run, data_plan, step=step)
    except AgffError as error:
        problem = error
    raise_together(problem)


def _check_data_plan(run: ResolvedRun, data_plan: Mapping[str, Any], *, step: int) -> None:
    folder, old = run.run_dir, read_state(run.run_dir, step).get("data_plan")
    if not isinstance(old, dict):
        state = checkpoint_folder(folder) / checkpoint_name(step) / STATE_FILE
        raise CheckpointError(
            f"{state}: data_plan missing, an older version wrote it; it cannot be continued: convert or "
            "evaluate it, or train into another --run_dir"
        )
    changed = plan_changes(old, data_plan)
    if changed and not run.config.data.accept_changes:
        raise ConfigError(
            f"{folder}: the order of the data changed since step {step}: {'; '.join(changed)}. Restore it to "
            "continue exactly, choose another --run_dir for a new run, or continue in the new order with "
            "--data.accept_changes true"
        )
    if old.get("rank_rows") != data_plan["rank_rows"] and rank() == 0:
        log.warning(
            "%s: the checkpoint of step %d is of a version whose ranks took other rows of the same global "
            "batches (now %s). The run continues with the same samples and the same loss, as on another "
            "number of ranks: up to rounding and dropout, not bit for bit",
            folder,
            step,
            data_plan["rank_rows"],
        )


def check_run_folder_together(run: ResolvedRun) -> None:
    """As `check_run_folder`, once no other job can write there: rank 0 looks, every rank raises.
    Collective."""
    problem = None
    if rank() == 0:
        try:
            check_run_folder(run)
        except AgffError as error:
            problem = error
    raise_together(problem)


@contextmanager
def hold_run_folder(folder: Path, *, patience_s: float) -> Iterator[None]:
    """Keep other jobs out of this run, whose folder is made when absent. Collective.

    Raises the same ConfigError on every rank when it cannot be written, or another process holds it for
    longer than `patience_s`: a machine that lost its power keeps its locks on a network file system for a
    while. Where the file system has no locks, nothing is held.
    """
    file, problem = None, None
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK_FILE).open("a+")
        except OSError as error:
            problem = ConfigError(
                f"{folder}: cannot write there: {error.strerror} ({error.filename}); choose another --run_dir"
            )
        deadline = time.monotonic() + patience_s
        while file is not None:
            try:
                # not flock: the loader's processes would inherit that
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(
                    f"{socket.gethostname()}, process {os.getpid()}"
                    + (f", job {job}" if (job := os.environ.get("SLURM_JOB_ID")) else "")
                    + "\n"
                )
                file.flush()
                break
            except (BlockingIOError, PermissionError):
                holder = (folder / LOCK_FILE).read_text().strip()
                if time.monotonic() > deadline:
                    problem = ConfigError(
                        f"{folder}: another process trains in this folder ({holder}); wait for it, choose "
                        f"another --run_dir, or delete {folder / LOCK_FILE} if that process is gone for good"
                    )
                    break
                log.warning(
                    "%s: waiting for another process that trains in this folder (%s); kill -TERM makes it "
                    "save and end",
                    folder,
                    holder,
                )
                time.sleep(min(10, patience_s))
            except OSError as error:
                log.warning(
                    "%s: this file system has no locks (%s); never run two jobs in it at once", folder, error
                )
                break
    with file or nullcontext():  # closed, it is free again; as it is when this process dies
        raise_together(problem)
        yield
