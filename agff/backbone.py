"""Loading and preparing the multimodal language model of a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from agff.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model's linear layers, instead of full tuning."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                f"backbone.lora.rank={self.rank} must be >= 1; for full tuning leave backbone.lora null"
            )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which model is trained, and which of its parameters."""

    path: str
    """Folder of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or LLaVA-OneVision model: weights, tokenizer, image
    processor."""
    lora: LoraConfig | None = None
    """Null: full tuning."""
    freeze_vision: bool = False
    """Leave the vision tower as it is (with full tuning; with lora it always is)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: one more forward for far less memory."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation of transformers."""


def load_backbone(folder: Path, *, dtype: torch.dtype, attention: str) -> Any:
    """The model of a Hugging Face folder without its language-model head.

    With an active ZeRO-3 configuration of transformers the parameters are partitioned while loading; then a
    collective. Raises ConfigError when the folder holds no model, or not all of its weights.
    """
    from transformers import AutoModel

    try:
        model, found = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}: cannot load a backbone: {str(error).splitlines()[0]}") from None
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{folder}: the weights lack {len(missing)} parameters of the model, {', '.join(missing[:3])}; "
            "they would begin at random: download the folder anew"
        )
    return model


def choose_trainable(backbone: Any, config: BackboneConfig) -> Any:
    """The backbone with adapters or frozen parts as configured; the soft tokens are added later and always
    train."""
    if config.lora is not None:
        import peft

        vision_free = r"(?!.*(visual|vision)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        lora = peft.LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=vision_free,
        )
        # in the backbone's own precision: ZeRO-3 wants one for all
        backbone = peft.get_peft_model(backbone, lora, autocast_adapter_dtype=False)
    elif config.freeze_vision:
        for name, parameter in backbone.named_parameters():
            if name.startswith(("visual.", "vision_tower.")):
                parameter.requires_grad_(False)
    if config.gradient_checkpointing:
        _enable_checkpointing(backbone)
    return backbone


def _enable_checkpointing(backbone: Any) -> None:
    """Non-reentrant: the reentrant form fails when two forwards precede one backward (ZeRO-3, one chunk)."""
    arguments = {"use_reentrant": False}
    model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:  # transformers before 5.23
        model.gradient_checkpointing_enable(arguments)
