"""Which number format a machine should compute in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from agff.errors import ConfigError

NVIDIA_DRIVER = Path("/proc/driver/nvidia/gpus")
Precision = Literal["bf16", "bf16_autocast", "fp32"]


def num_unusable_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that NVIDIA's driver knows on this machine and torch cannot use; 0 where the environment says to
    use none."""
    is_meant = environ.get("DS_ACCELERATOR") == "cpu" or environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if is_meant or not NVIDIA_DRIVER.is_dir() or torch.cuda.is_available():
        return 0
    return len(list(NVIDIA_DRIVER.iterdir()))


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the choice depends on; a value, so that the choice can be tested anywhere."""

    has_gpu: bool
    gpu_has_bf16: bool
    cpu_has_bf16: bool

    @classmethod
    def of_this_machine(cls) -> Hardware:
        """Look at the accelerator and at the processor's instructions (avx512_bf16 or amx_bf16)."""
        has_gpu = torch.cuda.is_available()
        cpu_info = Path("/proc/cpuinfo")
        words = set(cpu_info.read_text().split()) if cpu_info.exists() else set()
        return cls(
            has_gpu=has_gpu,
            gpu_has_bf16=has_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
            cpu_has_bf16=bool(words & {"avx512_bf16", "amx_bf16"}),
        )

    def choose_precision(self, wanted: Literal["auto", "bf16", "bf16_autocast", "fp32"]) -> Precision:
        """auto -> bf16 weights on a capable GPU, bf16 arithmetic with float32 weights on a capable CPU, else
        fp32."""
        if wanted == "auto":
            if self.has_gpu:
                return "bf16" if self.gpu_has_bf16 else "fp32"
            return "bf16_autocast" if self.cpu_has_bf16 else "fp32"
        if wanted == "bf16" and self.has_gpu and not self.gpu_has_bf16:
            raise ConfigError("precision=bf16, but this GPU has no bf16 arithmetic; use --precision fp32")
        return wanted
