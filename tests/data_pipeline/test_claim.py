from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import claim
from data_pipeline.claim import claimed


@contextlib.contextmanager
def no_locks(path: Path, *, wait: bool = True) -> Iterator[bool]:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))
    yield True


@pytest.mark.parametrize("has_locks", [True, False])
def test_the_second_waits_for_the_first_and_says_who_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    monkeypatch.setattr(claim, "_BEAT_S", 0.01)
    if not has_locks:
        monkeypatch.setattr(claim, "locked", no_locks)
        monkeypatch.setattr(claim, "_SETTLE_S", 0.01)
    warnings: list[str] = []
    second_waits = threading.Event()

    def warn(text: str, *values: object) -> None:
        warnings.append(text % values)
        second_waits.set()

    monkeypatch.setattr(claim.log, "warning", warn)
    events: list[str] = []

    def hold_second() -> None:
        with claimed(tmp_path / "lock"):
            events.append("second begins")

    second = threading.Thread(target=hold_second)
    with claimed(tmp_path / "lock"):
        second.start()
        assert second_waits.wait(60)
        events.append("first ends")
    second.join(60)
    assert events == ["first ends", "second begins"]
    name = f"process {os.getpid()} on {socket.gethostname()}, since 2"
    assert warnings[0].startswith(f"{tmp_path} is being written by {name}")
    assert len(warnings) == 1
    assert (tmp_path / "lock").read_bytes() == b""


@pytest.mark.parametrize("beats", [0, 40])
def test_a_claim_of_another_machine_counts_while_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: int
) -> None:
    """Also where that machine's lock cannot be seen from here."""
    path = tmp_path / "lock"
    path.write_text("process 7 on far-away, since yesterday\n0")
    looks = itertools.count(1)
    times = [0]

    def sleep(seconds: float) -> None:
        times[0] += int(claim._SILENT_S // 2)
        if (look := next(looks)) <= beats:
            path.write_text(f"process 7 on far-away, since yesterday\n{look}")

    monkeypatch.setattr(claim.time, "sleep", sleep)
    monkeypatch.setattr(claim.time, "monotonic", lambda: times[0])
    with claimed(path):
        assert next(looks) == beats + 3, "it is taken over after two more looks at an unchanged claim"


def test_a_killed_holder_of_this_machine_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    code = (
        "import os, signal, sys; from pathlib import Path; from data_pipeline.claim import claimed\n"
        "with claimed(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text().startswith("process ")
    monkeypatch.setattr(claim, "_wait_for_silence", None)
    with claimed(path):
        assert f"process {os.getpid()} on" in path.read_text()


def test_of_two_that_find_a_folder_free_at_the_same_moment_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks; the other one wrote last."""
    path = tmp_path / "lock"
    slept: list[float] = []
    monkeypatch.setattr(claim, "locked", no_locks)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            path.write_text("process 7 on far-away, since today\n0")

    warnings: list[str] = []
    monkeypatch.setattr(claim.log, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(claim.time, "sleep", sleep)
    monkeypatch.setattr(claim.time, "monotonic", lambda: 10 * sum(slept))
    with claimed(path):
        assert f"process {os.getpid()} on" in path.read_text()
    assert slept[0] == slept[-1] == claim._SETTLE_S
    assert len(slept) > 2
    assert warnings[0].startswith(f"{tmp_path} is being written by process 7 on far-away")


def test_a_claim_that_goes_with_its_complete_folder_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(claim, "locked", no_locks)
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: path.unlink())
    with claimed(path):
        pass
