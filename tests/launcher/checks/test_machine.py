"""Disks, limits and locks are made up; the machine itself is never touched."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checks.finding import Finding, State
from launcher.checks.machine import (
    GIB,
    Place,
    check_build_locks,
    check_disk,
    check_limits,
    check_shared_memory,
    extension_folder,
    places,
)
from tests.launcher.checks.test_finding import only, states


def file_system(
    *, size: int = 100 * GIB, free: int = 100 * GIB, free_files: int = 10**6
) -> Callable[[Path], Any]:
    block = 4096
    return lambda path: os.statvfs_result(
        (block, block, size // block, free // block, free // block, 10**7, free_files, free_files, 0, 255)
    )


@pytest.mark.parametrize(
    ("status", "state", "text"),
    [
        (file_system(), "ok", "100.0 GiB free"),
        (file_system(free=5 * GIB), "warning", "5.0 GiB free; 20.0 GiB or more is advised"),
        (file_system(free=GIB // 2), "error", "512 MiB free; less than 1.0 GiB does not do"),
        (file_system(free_files=3), "error", "only 3 more files"),
    ],
)
def test_free_space_is_judged(tmp_path: Path, status: Any, state: State, text: str) -> None:
    place = Place(
        name="run folder",
        path=tmp_path / "new" / "run",
        least_bytes=GIB,
        enough_bytes=20 * GIB,
        other="choose another",
    )
    (finding,) = check_disk([place], statvfs=status)
    assert (finding.state, finding.subject) == (state, "run folder")
    assert str(place.path) in finding.found
    assert text in finding.found
    assert state == "ok" or (str(tmp_path) in finding.remedy and "choose another" in finding.remedy)


def test_a_folder_that_cannot_be_written_to_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    place = Place(name="TMPDIR", path=tmp_path, least_bytes=0, enough_bytes=0, other="export TMPDIR=FOLDER")
    finding = only(check_disk([place], statvfs=file_system()))
    assert finding.state == "error"
    assert "not writable" in finding.found


def test_all_places_that_a_run_writes_to_are_looked_at(tmp_path: Path) -> None:
    found = {p.name: p.path for p in places({"TMPDIR": "/scratch"}, [tmp_path / "a"], home=tmp_path)}
    assert found == {
        "working folder": Path(),
        "run folder": tmp_path / "a",
        "shard cache": tmp_path / ".cache/agff/shards",
        "TMPDIR": Path("/scratch"),
    }
    assert [p.path for p in places({}, [], home=tmp_path) if p.name in ("run folder", "TMPDIR")] == [
        Path("runs"),
        Path("/tmp"),
    ]


@pytest.mark.parametrize(
    ("size_mib", "free_mib", "num_gpus", "state"),
    [
        (64, 64, 0, "warning"),
        (64, 64, 8, "error"),
        (512, 512, 8, "warning"),
        (4096, 4096, 8, "ok"),
        (4096, 3, 8, "error"),
    ],
)
def test_a_tiny_shared_memory_is_found(
    tmp_path: Path, size_mib: int, free_mib: int, num_gpus: int, state: State
) -> None:
    status = file_system(size=size_mib * 2**20, free=free_mib * 2**20)
    (finding,) = check_shared_memory(tmp_path, num_gpus=num_gpus, statvfs=status)
    assert finding.state == state
    assert str(tmp_path) in finding.found
    if size_mib < 1024:
        assert "--shm-size" in finding.remedy
        assert "--ipc=host" in finding.remedy
    elif free_mib < 1024:
        assert f"ls -lt {tmp_path}" in finding.remedy


def test_a_missing_shared_memory_is_an_error(tmp_path: Path) -> None:
    assert states(check_shared_memory(tmp_path / "shm")) == ["error"]


def limits(open_files: tuple[int, int], locked: int, infiniband: Path) -> list[Finding]:
    values = {resource.RLIMIT_NOFILE: open_files, resource.RLIMIT_MEMLOCK: (locked, locked)}
    return check_limits(getrlimit=values.__getitem__, infiniband=infiniband)


@pytest.mark.parametrize(
    ("open_files", "remedy"),
    [((1024, 524288), "ulimit -n 65536"), ((1024, 8192), "ulimit -n 8192"), ((1024, -1), "ulimit -n 65536")],
)
def test_a_low_limit_of_open_files_is_a_warning(
    tmp_path: Path, open_files: tuple[int, int], remedy: str
) -> None:
    finding = only(limits(open_files, -1, tmp_path / "none"))
    assert (finding.state, finding.subject, finding.remedy) == ("warning", "open files", remedy)
    assert "at most 1024" in finding.found


def test_a_low_hard_limit_needs_another_remedy(tmp_path: Path) -> None:
    finding = only(limits((1024, 1024), -1, tmp_path))
    assert "--ulimit nofile" in finding.remedy
    assert "ulimit -n" not in finding.remedy


def test_a_limit_of_locked_memory_matters_with_infiniband_only(tmp_path: Path) -> None:
    assert set(states(limits((4096, 4096), 2**16, tmp_path))) == {"ok"}
    (tmp_path / "mlx5_0").mkdir()
    assert set(states(limits((4096, 4096), -1, tmp_path))) == {"ok"}
    finding = only(limits((4096, 4096), 2**16, tmp_path))
    assert (finding.state, finding.subject) == ("warning", "locked memory")
    assert "mlx5_0" in finding.found


@pytest.mark.parametrize("place", ["deepspeed_shm_comm/lock", "py311_cpu/fused_adam/lock"])
def test_a_lock_that_nobody_holds_is_an_error(tmp_path: Path, place: str) -> None:
    lock = tmp_path / place
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    finding = only(check_build_locks(tmp_path))
    assert finding.state == "error"
    assert "60 min old" in finding.found
    assert "every later start waits on it silently" in finding.found
    assert finding.remedy.startswith(f"rm {lock} ")


def test_a_lock_that_a_build_holds_is_well_until_it_is_old(tmp_path: Path) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        (finding,) = check_build_locks(tmp_path)
        assert finding.state == "ok"
        assert f"process {os.getpid()} " in finding.found
        old = only(check_build_locks(tmp_path, now=lambda: time.time() + 3600))
    assert (old.state, str(os.getpid()) in old.remedy) == ("warning", True)


def test_a_lock_that_goes_away_meanwhile_is_no_finding(tmp_path: Path) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert states(check_build_locks(tmp_path, holder=lambda path: path.unlink())) == ["ok"]


def test_no_folder_of_builds_is_well(tmp_path: Path) -> None:
    assert states(check_build_locks(tmp_path / "absent")) == ["ok"]


def test_locks_are_looked_for_where_torch_builds(tmp_path: Path) -> None:
    assert extension_folder({"TORCH_EXTENSIONS_DIR": "/scratch/e", "XDG_CACHE_HOME": "/x"}) == Path(
        "/scratch/e"
    )
    assert extension_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/torch_extensions")
    assert extension_folder({}, home=tmp_path) == tmp_path / ".cache/torch_extensions"
