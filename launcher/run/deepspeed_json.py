"""The DeepSpeed JSON of a run: mechanism only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agff.errors import ConfigError

FILLED_IN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "steps_per_print",
)
"""Keys of the DeepSpeed JSON that belong to the recipe; they are filled in here and refused in the file."""


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The mechanism file. Raises ConfigError when it is unreadable, silent on clipping, or holds what cannot
    be used."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the DeepSpeed configuration: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError(
            f'{path}: "zero_optimization" must be an object whose "stage" is 1, 2 or 3; without ZeRO a '
            "gradient that is not "
            "finite would go into the parameters"
        )
    if writers := [key for key in ("checkpoint", "nebula", "datastates_ckpt") if key in values]:
        raise ConfigError(
            f"{path}: {', '.join(writers)}: DeepSpeed's own asynchronous writers cannot be used: when their "
            "process dies, saves are left out silently. Checkpoints are written, synced and hashed before "
            "they get their name"
        )
    if "gradient_clipping" not in values:
        raise ConfigError(
            f'{path}: "gradient_clipping" is missing; DeepSpeed would clip at 1.0 silently, so state it (0.0 '
            "for none)"
        )
    taken = [key for key in FILLED_IN if key in values]
    if taken:
        raise ConfigError(
            f"{path}: {', '.join(taken)} must not stand in this file; batch sizes, precision and optimizer "
            "come from the recipe (--batch.global_batch_size, --precision, --optimizer.*) and are filled in"
        )
    return values
