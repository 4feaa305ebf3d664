"""A run or a release, ready to encode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from agff.checkpoint import consolidated_weights
from agff.checkpoint_folder import check_checkpoint, latest_step
from agff.collectives import gather_objects
from agff.contract import CONTRACT_FILE
from agff.embedder import Embedder
from agff.errors import CheckpointError
from agff.objectives.nested import truncations_of
from agff.release import load
from launcher.run.backbone_identity import check_backbone
from launcher.run.config_file import CONFIG_FILE, read_run_config
from launcher.run.data import build_processor
from launcher.run.first_stage import backbone_folder
from launcher.run.meeting import together
from launcher.run.model import untrained_model


def load_model(path: Path, *, dtype: torch.dtype | None = None) -> Embedder:
    """The model of a release folder, or of the newest checkpoint of a run folder: on this rank's GPU where
    there is one, in bfloat16 where that GPU computes in it.

    dtype: of the weights, as whoever made the vectors to compare with read them: bfloat16, or float32 for as
    they are.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (path / CONTRACT_FILE).exists():
        embedder = load(path, device=device)
    else:
        embedder, _ = load_run(path)
    if dtype is None and device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.bfloat16
    if dtype == torch.bfloat16:
        embedder.read_in_bfloat16()
    embedder.model.to(device)
    return embedder


def load_together(load: Callable[[], Embedder]) -> Embedder:
    """What `load` makes on each rank, the same model on all of them. Collective.

    Raises on every rank the error of any; CheckpointError where ranks found other weights, as when a run
    saves meanwhile.
    """
    embedder = together(load)
    hashes = gather_objects(embedder.weights_sha256)
    if others := [str(index) for index, each in enumerate(hashes) if each != hashes[0]]:
        raise CheckpointError(
            f"of {len(hashes)} ranks these read other weights than rank 0: {', '.join(others)}; the run "
            "saved meanwhile (start again), or machines have other copies (copy the folder to all)"
        ).shared()
    return embedder


def load_run(run: Path) -> tuple[Embedder, int]:
    """(model of the newest complete checkpoint in float32 on the CPU, its step).

    Raises CheckpointError when there is none, it is damaged, the backbone folder is gone or, with LoRA, holds
    other weights than those it was trained on; ConfigError when it holds no backbone.
    """
    config = read_run_config(run)
    step = latest_step(run)
    if step is None:
        raise CheckpointError(
            f"{run}: the run has no complete checkpoint yet; let it train to its first save (save_every)"
        )
    if problems := check_checkpoint(run, step, shows_progress=True):
        raise CheckpointError(
            "\n".join(problems)
            + f"\n{run}: the newest checkpoint is damaged; training again falls back to an older one"
        )
    folder = backbone_folder(config.backbone.path)
    if not folder.is_dir():
        raise CheckpointError(_backbone_is_gone(run / CONFIG_FILE, folder))
    processor = build_processor(config)
    if config.backbone.lora is not None:
        check_backbone(run, step, folder)
    model = untrained_model(config, dtype=torch.float32, attention="sdpa")  # whatever it trained with
    weights = consolidated_weights(run, step=step)
    _fill(model, weights, f"{run}: checkpoint of step {step}")
    if model.head is not None and not model.head.is_released:
        model.head = None  # it served the training
    objective = config.loss if model.head is not None else None
    embedder = Embedder(
        model,
        processor,
        config.fusion,
        texts=config.texts,
        objective=objective,
        truncations=truncations_of(config.loss),
    )
    return embedder, step


def _fill(model: torch.nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    """Load the weights; CheckpointError unless they are all that trains in the model, in the right shapes."""
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = [f"{name} is missing" for name in sorted(trainable - weights.keys())]
    for name, weight in weights.items():
        if name not in shapes:
            problems.append(f"{name} is unknown to the model")
        elif weight.shape != shapes[name]:
            problems.append(f"{name} is {list(weight.shape)}, in the model {list(shapes[name])}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{what} does not fit the model of its configuration: {'; '.join(problems[:5])}{more}; the "
            "backbone folder holds another model now, or the configuration was edited: restore them"
        )
    model.load_state_dict(weights, strict=False)


def _backbone_is_gone(stored: Path, folder: Path) -> str:
    found = f"{stored}: backbone.path={folder}: no such folder"
    if folder.is_absolute():
        return f"{found}; if the backbone moved, write its new place there; if it is lost, download it again"
    return (
        f"{found} in {Path.cwd()}, and the path is relative to the folder in which the run was started; run "
        "this command there, or write the absolute path into that file"
    )
