"""What DeepSpeed itself reads of a checkpoint: the oracle of our own reader."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from agff.checkpoint_folder import checkpoint_folder, checkpoint_name


def consolidated_weights(run: Path, *, step: int) -> dict[str, Tensor]:
    """The model's parameters in float32, put together from the ZeRO partitions; frozen ones that were left
    out are absent."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint_folder(run)), tag=checkpoint_name(step))
