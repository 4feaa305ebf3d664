"""Who may train in a run's folder."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from agff.errors import AgffError, ConfigError
from launcher.command_line import report
from launcher.run.folder import hold_run_folder


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
            ConfigError, match=rf"process {other.pid}, job .*or delete .*run/.lock if"
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
