"""One small project and its three runs, shared by all tests of whole runs: each start of two ranks costs
seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launcher.runs import run_command, small_project, train_command


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def train_once(project: Path) -> Callable[[int], tuple[Path, str]]:
    """ZeRO stage -> (run folder, output) of the README's command, unbroken; each stage is trained once."""

    @functools.cache
    def train(stage: int) -> tuple[Path, str]:
        result = run_command(train_command(stage), project)
        assert result.returncode == 0, result.stdout
        return project / "runs" / f"quickstart-zero{stage}", result.stdout

    return train


@pytest.fixture(scope="session")
def lora_run(project: Path) -> tuple[str, Path]:
    """(command, run folder) of a run with adapters, unbroken and validated."""
    command = f"{train_command(3)} --backbone.lora.rank 2 --run_dir runs/lora --backbone.lora.dropout 0.1"
    command += " --loss.nested_dims [8] --loss.nested_fine [0]"
    command += " --validate_every 2 --keep_best mmvp --validation.mmvp .cache/quickstart/data/mmvp"
    result = run_command(command, project)
    assert result.returncode == 0, result.stdout
    return command, project / "runs/lora"
