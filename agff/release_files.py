"""The files of a release beside its backbone: names, and reading them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agff.contract import CONVERT_AGAIN
from agff.errors import CheckpointError
from agff.objectives.objective import Head

PROMPTS_FILE, GOLDEN_FILE = "prompts.safetensors", "golden.safetensors"
BACKBONE_FOLDER, PROCESSOR_FOLDER = "backbone", "processor"


def settings_folder(weights: str) -> str:
    """Where configuration, tokenizer and image processor are, by the contract's `weights`. Not beside an
    adapter, where peft would take the tokenizer for a reason to resize the vocabulary."""
    return PROCESSOR_FOLDER if weights == "adapter" else BACKBONE_FOLDER


def fill_head(head: Head, path: Path) -> None:
    """Weights of a release's head. Raises CheckpointError when names or shapes differ."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {CONVERT_AGAIN}") from None
    wanted = head.state_dict()
    if problems := [
        f"{name} is {list(found[name].shape) if name in found else 'missing'}, must be "
        f"{list(wanted[name].shape) if name in wanted else 'absent'}"
        for name in sorted(wanted.keys() | found.keys())
        if name not in wanted or name not in found or found[name].shape != wanted[name].shape
    ]:
        raise CheckpointError(f"{path}: {'; '.join(problems)}; {CONVERT_AGAIN}")
    head.load_state_dict(found)


def read_tensor(path: Path, name: str, shape: torch.Size) -> Tensor:
    """One tensor of a release's file. Raises CheckpointError when it is absent or of another shape."""
    try:
        tensor = load_file(path)[name]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot read tensor `{name}`: {error}; {CONVERT_AGAIN}") from None
    if tensor.shape != shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: `{name}` is {tensor.dtype} {list(tensor.shape)}, must be floating-point {list(shape)}; "
            f"{CONVERT_AGAIN}"
        )
    return tensor
