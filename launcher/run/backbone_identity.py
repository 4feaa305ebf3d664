"""Is the backbone still the one that a run's adapters were trained on? On another they are another model."""

from __future__ import annotations

from pathlib import Path

from agff.backbone_folder import backbone_sha256
from agff.checkpoint_folder import STATE_FILE, checkpoint_folder, checkpoint_name, read_state
from agff.collectives import raise_together, rank
from agff.errors import AgffError, CheckpointError
from launcher.run.config import ResolvedRun
from launcher.run.first_stage import backbone_folder


def backbone_of_run(run: ResolvedRun, *, start_step: int) -> str | None:
    """Fingerprint of the weights that the run began from, for its checkpoints. Collective.

    A new run (start_step 0) hashes its backbone folder, on rank 0: the others take their weights from there.
    With LoRA a continued one does so again, and every rank raises the same CheckpointError when they are
    others now. With full tuning the checkpoint holds all weights, so it only hands on what the checkpoint
    says: None when an older version wrote it. On the other ranks None.
    """
    found, problem = None, None
    if rank() == 0:
        folder, is_lora = backbone_folder(run.config.backbone.path), run.config.backbone.lora is not None
        try:
            if start_step and is_lora:
                found = check_backbone(run.run_dir, start_step, folder)
            elif start_step:
                found = read_state(run.run_dir, start_step).get("backbone_sha256")
            else:
                found = backbone_sha256(folder)
        except AgffError as error:
            problem = error
    raise_together(problem)
    return found


def check_backbone(run: Path, step: int, folder: Path) -> str:
    """Fingerprint of the weights in `folder`; CheckpointError when the checkpoint's adapters were trained on
    others."""
    state = checkpoint_folder(run) / checkpoint_name(step) / STATE_FILE
    expected, found = read_state(run, step).get("backbone_sha256"), backbone_sha256(folder)
    if not isinstance(expected, str):
        raise CheckpointError(
            f"{state}: does not say which backbone its adapters were trained on, an older version wrote it; "
            f'if it is {folder} as it is now, add "backbone_sha256": "{found}" to that file'
        )
    if found != expected:
        raise CheckpointError(
            f"{folder}: these weights (sha256 {found:.12}...) are not those that the adapters of {run} were "
            f"trained on (sha256 {expected:.12}... in {state}), and together they would be another model; "
            "put the old weights back there, or train a new run on these"
        )
    return found
