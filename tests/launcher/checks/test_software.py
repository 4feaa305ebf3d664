"""Versions and devices are made up; the machine itself is only asked."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from launcher.checks.finding import Finding, State
from launcher.checks.software import Devices, check_devices, check_versions
from tests.launcher.checks.test_finding import only, states

CPU_ONLY = Devices(gpus=(), has_bf16=False, nccl="", has_gloo=True, num_unusable=0, torch_build="cpu")
EIGHT_GPUS = Devices(
    gpus=("H200",) * 8, has_bf16=True, nccl="2.27.3", has_gloo=True, num_unusable=0, torch_build="13.0"
)


def versions(tmp_path: Path, **changed: str | None) -> list[Finding]:
    """check_versions of a file that pins torch, deepspeed and an extra; `changed` is what is installed
    instead."""
    pins = tmp_path / "requirements.txt"
    pins.write_text(
        "# tried together\ntorch==2.13.0\ndeepspeed==0.19.8\njsonargparse[signatures]==4.53.0\n-e .\n"
    )
    installed = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "jsonargparse": "4.53.0"} | changed

    def version_of(name: str) -> str:
        if (version := installed[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return check_versions(pins, version_of=version_of, python=(3, 11, 7))


def test_pinned_versions_are_well_also_with_a_local_part(tmp_path: Path) -> None:
    findings = versions(tmp_path)
    assert states(findings) == ["ok", "ok"]
    assert "torch 2.13.0+cpu, deepspeed 0.19.8, jsonargparse 4.53.0" in findings[1].found


def test_a_missing_package_is_an_error(tmp_path: Path) -> None:
    finding = only(versions(tmp_path, deepspeed=None))
    assert (finding.state, finding.remedy) == ("error", f"pip install -r {tmp_path / 'requirements.txt'}")
    assert finding.found == "deepspeed is not installed; 0.19.8 is pinned"


def test_another_version_is_a_warning(tmp_path: Path) -> None:
    finding = only(versions(tmp_path, jsonargparse="4.53.1"))
    assert finding.state == "warning"
    assert "jsonargparse 4.53.1; 4.53.0 is pinned" in finding.found


def test_without_requirements_the_needed_packages_are_asked_for(tmp_path: Path) -> None:
    asked: list[str] = []

    def version_of(name: str) -> str:
        asked.append(name)
        return "1"

    findings = check_versions(tmp_path / "absent", version_of=version_of)
    assert set(states(findings)) == {"ok"}
    assert {"torch", "deepspeed", "transformers", "peft"} <= set(asked)


def test_an_old_python_is_an_error(tmp_path: Path) -> None:
    finding = only(check_versions(tmp_path / "absent", version_of=lambda name: "1", python=(3, 10, 4)))
    assert finding.state == "error"
    assert "python 3.10.4; 3.11 or newer" in finding.found


def test_no_gpu_is_well() -> None:
    findings = check_devices(CPU_ONLY)
    assert set(states(findings)) == {"ok"}
    assert findings[0].found == "none: CPU and gloo"


def test_gpus_are_counted_by_kind() -> None:
    findings = check_devices(EIGHT_GPUS)
    assert [finding.found for finding in findings] == ["8 x H200; bf16", "2.27.3", "available"]


@pytest.mark.parametrize(
    ("devices", "state", "text"),
    [
        (
            Devices(**{**vars(CPU_ONLY), "num_unusable": 2}),
            "error",
            "the driver knows 2 NVIDIA GPUs, torch (cpu build)",
        ),
        (Devices(**{**vars(CPU_ONLY), "has_gloo": False}), "error", "no gloo"),
        (Devices(**{**vars(EIGHT_GPUS), "has_bf16": False}), "warning", "without bf16"),
        (Devices(**{**vars(EIGHT_GPUS), "nccl": ""}), "error", "no NCCL"),
        (Devices(**{**vars(EIGHT_GPUS), "has_gloo": False}), "warning", "no gloo"),
    ],
)
def test_what_torch_cannot_use_is_named(devices: Devices, state: State, text: str) -> None:
    finding = only(check_devices(devices))
    assert finding.state == state
    assert text in finding.found


def test_devices_of_this_machine_can_be_asked_for() -> None:
    devices = Devices.of_this_machine()
    assert devices.has_gloo
    assert bool(devices.gpus) == torch.cuda.is_available()
