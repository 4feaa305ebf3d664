"""A run or a release, ready to encode."""

from __future__ import annotations

from pathlib import Path

import torch

from agff.checkpoint import consolidated_weights
from agff.checkpoint_folder import check_checkpoint, latest_step
from agff.embedder import Embedder
from agff.errors import CheckpointError
from agff.release import CONTRACT_FILE, load
from launcher.run.folder import read_run_config
from launcher.run.model import build_processor, untrained_model


def load_model(path: Path) -> Embedder:
    """The model of a release folder, or of the newest checkpoint of a run folder, on the GPU where there is
    one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (path / CONTRACT_FILE).exists():
        return load(path, device=device)
    embedder, _ = load_run(path)
    embedder.model.to(device)
    return embedder


def load_run(run: Path) -> tuple[Embedder, int]:
    """(model of the newest complete checkpoint in float32 on the CPU, its step). Raises CheckpointError."""
    config = read_run_config(run)
    step = latest_step(run)
    if step is None:
        raise CheckpointError(
            f"{run}: the run has no complete checkpoint yet; let it train to its first save (save_every)"
        )
    if problems := check_checkpoint(run, step):
        raise CheckpointError(
            f"{run}: the newest checkpoint is damaged: {problems[0]}; training again falls back to an older "
            "one"
        )
    model = untrained_model(config, dtype=torch.float32, attention="sdpa")  # whatever it trained with
    weights = consolidated_weights(run, step=step)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unexpected or trainable & set(missing):
        raise CheckpointError(
            f"{run}: checkpoint of step {step} does not fit the model of its configuration: "
            f"missing {sorted(trainable & set(missing))[:3]}, unexpected {unexpected[:3]}"
        )
    return Embedder(model, build_processor(config), config.fusion), step
