"""AdamW and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from agff.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up; torch's own implementation, stated in full because DeepSpeed's defaults differ."""

    learning_rate: float
    """Peak, reached at the end of the warm-up."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """After the warm-up; cosine and linear end at 0 at the last step."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate={self.learning_rate} must be > 0")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay} must be >= 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be >= 0 and < 1")
        if self.epsilon <= 0:
            raise ConfigError(f"optimizer.epsilon={self.epsilon} must be > 0")
        if self.warmup_steps < 0:
            raise ConfigError(f"optimizer.warmup_steps={self.warmup_steps} must be >= 0")


def build_adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW, fused: one kernel for each tensor, on a GPU and on a CPU."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, *, num_steps: int) -> Any:
    """Warm-up from 0, then the configured curve over `num_steps` steps in all."""
    from transformers import get_scheduler

    return get_scheduler(
        config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps
    )
