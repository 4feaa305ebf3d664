"""Who may train in a run's folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agff.errors import AgffError, CheckpointError, ConfigError
from launcher.command_line import report
from launcher.run.config import ResolvedRun
from launcher.run.folder import (
    check_data_plan,
    check_run_folder,
    check_run_folder_together,
    hold_run_folder,
)


def hold(folder: Path, held: Event) -> None:
    with hold_run_folder(folder, patience_s=0):
        if os.fork() == 0:  # as a loader's process, which outlives a killed rank for a moment
            time.sleep(3)
            os._exit(0)
        held.set()
        time.sleep(60)


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(
            ConfigError, match=rf"process {other.pid}\); .*or delete .*run/.lock if"
        ) as caught:
            hold_run_folder(tmp_path / "run", patience_s=0).__enter__()
        assert caught.value.on_all_ranks
        other.kill()
        other.join()
        with hold_run_folder(tmp_path / "run", patience_s=0):
            pass
    finally:
        other.kill()


@pytest.mark.parametrize(
    ("rank", "local_rank", "shared", "said"),
    [
        ("0", "0", False, "error: it"),
        ("0", "0", True, "error: it"),
        ("8", "0", False, "error on rank 8 ("),
        ("8", "0", True, ""),
        ("9", "1", False, ""),
    ],
)
def test_an_error_is_said_once_or_once_a_machine(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: str,
    local_rank: str,
    shared: bool,
    said: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    error = AgffError("it")
    assert report(error.shared() if shared else error) == 2
    found = capfd.readouterr().err.lstrip()
    assert found.startswith(said)
    assert bool(found) == bool(said)


def run_in(folder: Path, **data: Any) -> ResolvedRun:
    """As much of a run as the checks of its folder read."""
    settings = SimpleNamespace(accept_changes=data.get("accept_changes", False))
    return cast(Any, SimpleNamespace(run_dir=folder, config=SimpleNamespace(data=settings)))


def test_a_run_folder_that_is_a_file_or_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"file is a file; choose another --run_dir"):
        check_run_folder(run_in(file))
    with (
        pytest.raises(
            ConfigError, match=r"file/run: cannot write there: .*choose another --run_dir"
        ) as caught,
        hold_run_folder(file / "run", patience_s=0),
    ):
        pass
    assert caught.value.on_all_ranks


@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("state", [{}, {"data_plan": None}, {"data_plan": []}])
def test_a_checkpoint_without_a_data_plan_is_refused_on_all_ranks(
    tmp_path: Path, state: dict[str, Any], accepts: bool
) -> None:
    checkpoint = tmp_path / "checkpoints/step-000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 4, "world_size": 2, **state}))
    with pytest.raises(CheckpointError, match=r"state\.json: data_plan missing, an older version") as caught:
        check_data_plan(run_in(tmp_path, accept_changes=accepts), {}, step=4)
    assert caught.value.on_all_ranks


def test_a_state_that_cannot_be_read_is_raised_on_all_ranks(tmp_path: Path) -> None:
    """One rank alone may not see the file: the others would wait for it."""
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read") as caught:
        check_data_plan(run_in(tmp_path), {}, step=4)
    assert caught.value.on_all_ranks
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(AgffError, match=r"config\.yaml") as caught:
        check_run_folder_together(run_in(tmp_path))
    assert caught.value.on_all_ranks
