"""A run or a release, ready to encode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agff.backbone import backbone_tensors
from agff.checkpoint_folder import check_checkpoint, checkpoint_folder, checkpoint_name, complete_steps
from agff.collectives import gather_objects
from agff.contract import CONTRACT_FILE
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError
from agff.lazy_tensor import LazyTensor, Piece
from agff.objectives.nested import truncations_of
from agff.release import load
from agff.release_parts import plain_backbone, plain_names
from agff.zero_weights import ZeroWeights
from launcher.run.backbone_identity import check_backbone
from launcher.run.config import RunConfig
from launcher.run.config_file import CONFIG_FILE, read_run_config
from launcher.run.data import build_processor
from launcher.run.first_stage import backbone_folder
from launcher.run.meeting import together
from launcher.run.model import empty_model, untrained_model


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
    config, step = read_run_config(run), step_of(run, None)
    if problems := check_checkpoint(run, step, shows_progress=True):
        raise CheckpointError(damaged(run, step, problems))
    folder = _existing_backbone(run, config)
    if config.backbone.lora is not None:
        check_backbone(run, step, folder)
    model = untrained_model(config, dtype=torch.float32, attention="sdpa")  # whatever it trained with
    weights = ZeroWeights(checkpoint_folder(run) / checkpoint_name(step)).tensors
    _check_fits(model, weights, f"{run}: checkpoint of step {step}")
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, lazy in weights.items():
            own[name].copy_(lazy.read())
    return _embedder(config, model), step


@dataclass(frozen=True)
class TrainedRun:
    """A run's model at a checkpoint, without its weights in memory."""

    embedder: Embedder
    """Its parameters are on the meta device."""
    weights: dict[str, LazyTensor]
    """All of them, by the names of the parameters; of an objective's head only where it is released."""
    pieces: Sequence[Piece]
    """Where those of the checkpoint lie in its files."""
    step: int
    backbone: Path


def open_run(run: Path, *, step: int | None, universal: Path | None = None) -> TrainedRun:
    """The model of a complete checkpoint, the newest without a step; or of a universal checkpoint of the run.

    What the checkpoint leaves out, since it did not train, is the backbone folder's. Of damage only what
    sizes show is found here: look for more with `agff.lazy_tensor.damaged_records`. Raises CheckpointError
    and ConfigError as `load_run`.
    """
    config = read_run_config(run)
    if universal is None:
        step = step_of(run, step)
        if problems := check_checkpoint(run, step, hashes=False):
            raise CheckpointError(damaged(run, step, problems))
    folder = _existing_backbone(run, config)
    stored = ZeroWeights(universal or checkpoint_folder(run) / checkpoint_name(step or 0))
    step = stored.step if universal is not None else step
    model = empty_model(config)
    _check_fits(model, stored.tensors, f"{universal or run}: checkpoint of step {step}")
    embedder = _embedder(config, model)
    names = {name: plain for name, plain in plain_names(model).items() if name not in stored.tensors}
    weights = dict(stored.tensors)
    if names:
        # all steps of a run are of one backbone, but a damaged one cannot say it
        check_backbone(run, step_of(run, step if universal is None else None), folder)
        parameters = dict(model.named_parameters())
        shells = {plain: parameters[name] for name, plain in plain_names(model).items()}
        base = backbone_tensors(folder, plain_backbone(model), shells)
        weights |= {name: base[plain] for name, plain in names.items()}
    wanted = {name for name, _ in embedder.model.named_parameters()}
    weights = {name: lazy for name, lazy in weights.items() if name in wanted}
    return TrainedRun(embedder, weights, stored.pieces, step or 0, folder)


def step_of(run: Path, step: int | None) -> int:
    """The step, by default the newest, of a complete checkpoint. Raises CheckpointError where there is
    none."""
    steps = complete_steps(run)
    if not steps:
        raise CheckpointError(
            f"{run}: the run has no complete checkpoint yet; let it train to its first save (save_every)"
        )
    if step is not None and step not in steps:
        there = ", ".join(map(str, reversed(steps)))
        raise CheckpointError(f"{run}: no complete checkpoint of step {step}; there are those of {there}")
    return steps[0] if step is None else step


def damaged(run: Path, step: int, problems: Sequence[str]) -> str:
    """What is wrong with a checkpoint, and what to do."""
    older = [other for other in complete_steps(run) if other < step]
    remedy = (
        f"convert an older one with --step {older[0]}, or train again, which" if older else "training again"
    )
    newest = "newest " if step == max(complete_steps(run), default=step) else ""
    return "\n".join(problems) + (
        f"\n{run}: the {newest}checkpoint is damaged (step {step}); {remedy} falls back to an older one"
    )


def _embedder(config: RunConfig, model: EmbeddingModel) -> Embedder:
    """With the head where it is part of the model."""
    if model.head is not None and not model.head.is_released:
        model.head = None  # it served the training
    return Embedder(
        model,
        build_processor(config),
        config.fusion,
        texts=config.texts,
        objective=config.loss if model.head is not None else None,
        truncations=truncations_of(config.loss),
    )


def _check_fits(model: torch.nn.Module, weights: Mapping[str, LazyTensor], what: str) -> None:
    """CheckpointError unless the weights are all that trains in the model, in the right shapes."""
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


def _existing_backbone(run: Path, config: RunConfig) -> Path:
    folder = backbone_folder(config.backbone.path)
    if not folder.is_dir():
        raise CheckpointError(_backbone_is_gone(run / CONFIG_FILE, folder))
    return folder


def _backbone_is_gone(stored: Path, folder: Path) -> str:
    found = f"{stored}: backbone.path={folder}: no such folder"
    if folder.is_absolute():
        return f"{found}; if the backbone moved, write its new place there; if it is lost, download it again"
    return (
        f"{found} in {Path.cwd()}, and the path is relative to the folder in which the run was started; run "
        "this command there, or write the absolute path into that file"
    )
