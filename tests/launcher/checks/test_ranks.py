"""The ranks that doctor starts, and those that fail: none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from launcher.checks import ranks as doctor_ranks
from launcher.checks.finding import Finding
from launcher.checks.ranks import check_ranks
from tests.launcher.checks.test_finding import only, states

LIMIT_S = 120 + os.getpid() / 1e7
"""Stands in the command of the ranks: those of a test that runs beside this one are not ours."""


def ranks_left_behind() -> list[list[str]]:
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [
        command for command in commands if any(f"step_on_this_rank({LIMIT_S})" in word for word in command)
    ]


def test_two_ranks_meet_and_take_a_step_and_compile_nothing(tmp_path: Path) -> None:
    environ = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    found: list[Finding] = []
    thread = threading.Thread(
        target=lambda: found.extend(check_ranks(environ=environ, limit_s=LIMIT_S, log_folder=tmp_path))
    )
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, len(ranks_left_behind()))
        time.sleep(0.2)
    assert most == 2, "they were there to be seen"
    assert ranks_left_behind() == []
    assert states(found) == ["ok"], found
    assert "(NCCL untried): all-reduce and a step of three chunks under ZeRO-1, 2 and 3 in" in found[0].found
    assert list(tmp_path.iterdir()) == [], "no operator was built, no log written"


def test_ranks_that_cannot_meet_are_an_error_with_their_last_words(tmp_path: Path) -> None:
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": "nosuch0"}
    finding = only(check_ranks(environ=environ, limit_s=LIMIT_S, log_folder=tmp_path))
    assert finding.state == "error"
    assert "ended with code 1" in finding.found
    assert "nosuch0" in finding.found
    (log,) = tmp_path.iterdir()
    assert "Traceback" in log.read_text()
    assert str(log) in finding.remedy
    assert ranks_left_behind() == []


def test_one_rank_that_is_done_does_not_speak_for_the_other() -> None:
    processes = [subprocess.Popen(["sh", "-c", command]) for command in ("exit 0", "sleep 1; exit 3")]
    assert doctor_ranks._first_failure(processes, time.monotonic() + 60) == 1


def test_ranks_that_take_too_long_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LIMIT_S", 1 + os.getpid() / 1e8)
    start = time.monotonic()
    finding = only(check_ranks(limit_s=LIMIT_S, log_folder=tmp_path))
    assert finding.state == "error"
    assert "not done within 1 s" in finding.found
    assert time.monotonic() - start < 20
    assert ranks_left_behind() == []
