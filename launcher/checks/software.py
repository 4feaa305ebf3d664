"""What is installed, as `doctor` sees it: Python, packages against their pins, and what torch can use."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.checks.finding import Finding, State

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
OLDEST_PYTHON = (3, 11)
NEEDED = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "accelerate",
    "webdataset",
    "pyarrow",
    "safetensors",
    "pillow",
)
"""Packages without which nothing runs; asked for when there is no requirements.txt to read."""


def check_versions(
    requirements: Path = REQUIREMENTS,
    *,
    version_of: Callable[[str], str] = importlib.metadata.version,
    python: tuple[int, ...] = tuple(sys.version_info[:3]),
) -> list[Finding]:
    """Python, and each package against its pin."""
    name = "python " + ".".join(map(str, python))
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if python < OLDEST_PYTHON:
        remedy = f"apt install python{oldest} (or newer), then make install"
        findings = [Finding("error", "versions", f"{name}; {oldest} or newer is needed", remedy)]
    else:
        findings = [Finding("ok", "versions", name)]
    install = f"pip install -r {requirements}" if requirements.exists() else "pip install agff-embed"
    agreeing = []
    for package, pinned in _pins(requirements).items():
        try:
            version = version_of(package)
        except importlib.metadata.PackageNotFoundError:
            found = f"{package} is not installed" + (f"; {pinned} is pinned" if pinned else "")
            findings.append(Finding("error", "versions", found, install))
            continue
        if pinned and version.partition("+")[0] != pinned:
            found = f"{package} {version}; {pinned} is pinned, other versions were not tried"
            findings.append(Finding("warning", "versions", found, install))
        else:
            agreeing.append(f"{package} {version}")
    if agreeing:
        found = (
            f"{', '.join(agreeing[:4])} and {len(agreeing) - 4} more"
            if len(agreeing) > 5
            else ", ".join(agreeing)
        )
        findings.append(Finding("ok", "versions", found))
    return findings


def _pins(requirements: Path) -> dict[str, str]:
    """Package -> pinned version, "" where none is known."""
    if not requirements.exists():
        return dict.fromkeys(NEEDED, "")
    lines = (
        re.match(r"([\w.-]+)(?:\[[^\]]*\])?==([\w.!+-]+)", line)
        for line in requirements.read_text().splitlines()
    )
    return {line[1]: line[2] for line in lines if line}


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What torch sees of this machine."""

    gpus: tuple[str, ...]
    has_bf16: bool
    """All GPUs compute in bf16."""
    nccl: str
    """Version; "" when torch has none."""
    has_gloo: bool
    num_unusable: int
    """NVIDIA GPUs that the driver knows and torch cannot use, though nothing hides them."""
    torch_build: str
    """`cpu`, or the CUDA version that torch was built for."""

    @classmethod
    def of_this_machine(cls) -> Devices:
        """Ask torch and the driver."""
        import torch
        import torch.distributed as dist

        from launcher.run.hardware import num_unusable_gpus

        with warnings.catch_warnings(record=True):  # torch warns of an unusable driver; the finding says it
            has_gpu = torch.cuda.is_available()
        gpus = (
            tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if has_gpu else ()
        )
        has_nccl = has_gpu and dist.is_nccl_available()
        return cls(
            gpus=gpus,
            has_bf16=bool(gpus)
            and all(torch.cuda.get_device_capability(i)[0] >= 8 for i in range(len(gpus))),
            nccl=".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "",
            has_gloo=dist.is_gloo_available(),
            num_unusable=num_unusable_gpus(os.environ),
            torch_build=torch.version.cuda or "cpu",
        )


def check_devices(devices: Devices) -> list[Finding]:
    """GPUs, bf16, NCCL and gloo."""
    findings = []
    again = "pip install --force-reinstall -r requirements.txt"
    if devices.gpus:
        kinds = ", ".join(f"{devices.gpus.count(name)} x {name}" for name in dict.fromkeys(devices.gpus))
        if devices.has_bf16:
            findings.append(Finding("ok", "GPUs", f"{kinds}; bf16"))
        else:
            found = f"{kinds}; without bf16, which the recipes of real backbones use"
            findings.append(Finding("warning", "GPUs", found, remedy="train with --precision fp32"))
        if devices.nccl:
            findings.append(Finding("ok", "NCCL", devices.nccl))
        else:
            findings.append(Finding("error", "NCCL", "torch has no NCCL; ranks on GPUs meet over it", again))
    elif devices.num_unusable:
        found = (
            f"the driver knows {devices.num_unusable} NVIDIA GPUs, torch ({devices.torch_build} build) can "
            "use none"
        )
        remedy = (
            "compare the CUDA version in nvidia-smi; install torch's build for it; or DS_ACCELERATOR=cpu to "
            "use none"
        )
        findings.append(Finding("error", "GPUs", found, remedy))
    else:
        findings.append(Finding("ok", "GPUs", "none: CPU and gloo"))
    if devices.has_gloo:
        findings.append(Finding("ok", "gloo", "available"))
    else:
        state: State = "warning" if devices.gpus else "error"
        findings.append(Finding(state, "gloo", "torch has no gloo; ranks on CPUs meet over it", again))
    return findings
