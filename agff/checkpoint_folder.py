"""What is on disk of a run's checkpoints: complete or absent, never half. No process group, no DeepSpeed.

<run>/checkpoints/step-000100/           DeepSpeed's files, written under `step-000100.partial`, then renamed
                              random-00000.pt ...   each rank's random state
                              state.json            step, ranks, hashes of the files, the data plan, the
                                                    fingerprint of the backbone's weights; written last
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from agff.errors import CheckpointError
from agff.files import changed_files

STATE_FILE = "state.json"


def checkpoint_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def complete_steps(run: Path) -> list[int]:
    """Steps of all complete checkpoints, the newest first. Half-written ones do not count."""
    steps = [
        int(match[1])
        for folder in checkpoint_folder(run).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / STATE_FILE).exists()
    ]
    return sorted(steps, reverse=True)


def latest_step(run: Path) -> int | None:
    """Step of the newest complete checkpoint; None when there is none."""
    return next(iter(complete_steps(run)), None)


def remove_unfinished(run: Path) -> None:
    """Remove what killed saves, removals and conversions left. Only for the one process that holds the
    run."""
    for kind in ("partial", "removed", "universal"):
        for folder in checkpoint_folder(run).glob(f"step-*.{kind}"):
            shutil.rmtree(folder, ignore_errors=True)


def check_checkpoint(
    run: Path,
    step: int,
    *,
    part: int = 0,
    num_parts: int = 1,
    hashes: bool = True,
    shows_progress: bool = False,
) -> list[str]:
    """One line for each missing or changed file among every `num_parts`-th one of a checkpoint.

    hashes: compare size and SHA-256, with a progress bar if asked; else size and the end of what torch.save
    wrote, and gigabytes stay unread.
    """
    folder = checkpoint_folder(run) / checkpoint_name(step)
    try:
        state = read_state(run, step)
    except CheckpointError as error:
        return [str(error)]
    if state["step"] != step:
        return [f"{folder / STATE_FILE}: is of step {state['step']}"]
    files = state.get("files")
    if not isinstance(files, dict) or not all(isinstance(written, str) for written in files.values()):
        return [f"{folder / STATE_FILE}: `files` must be a mapping of names to hashes, found {files!r:.60}"]
    own = dict(sorted(files.items())[part::num_parts])
    if hashes:
        return changed_files(folder, own, shows_progress=shows_progress)
    changed = {name: changed_files(folder, {name: own[name]}, max_hashed_bytes=0) for name in own}
    return [problem for name in own for problem in changed[name] or _unreadable(folder / name)]


def _unreadable(path: Path) -> list[str]:
    """A zip archive, as torch.save writes them, ends with its directory."""
    with contextlib.suppress(zipfile.BadZipFile):  # of a damaged directory
        if path.suffix != ".pt" or zipfile.is_zipfile(path):
            return []
    return [f"{path}: damaged: not a file that torch.save wrote"]


def remove_old_checkpoints(
    run: Path, *, keep_last: int | None, keep_every: int | None, best: int | None = None
) -> None:
    """Keep the newest `keep_last` checkpoints (None: all), those whose step is a multiple of `keep_every`,
    and that of step `best`."""
    if keep_last is None:
        return
    for step in complete_steps(run)[keep_last:]:
        if step != best and (not keep_every or step % keep_every):
            remove_checkpoint(checkpoint_folder(run) / checkpoint_name(step))


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove it, its name first, so that a kill in the middle leaves nothing that looks whole."""
    removed = checkpoint.with_name(f"{checkpoint.name}.removed")
    with contextlib.suppress(FileNotFoundError):
        checkpoint.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def read_state(run: Path, step: int) -> dict[str, Any]:
    """The JSON state stored with a checkpoint, with its `step` and `world_size`. Raises CheckpointError when
    it cannot be read."""
    path = checkpoint_folder(run) / checkpoint_name(step) / STATE_FILE
    remedy = f"restore it from a copy, or set the checkpoint aside: mv {path.parent} {path.parent}.damaged"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {remedy}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {state!r:.60}; {remedy}")
    for name in ("step", "world_size"):
        if type(state.get(name)) is not int:
            raise CheckpointError(f"{path}: {name} must be a number, found {state.get(name)!r}; {remedy}")
    return state


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"
