"""Faults are injected into the inputs of each check; the machine itself is never touched."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from launcher import doctor, doctor_checks
from launcher.command_line import parse_train_arguments
from launcher.config import as_dict
from launcher.doctor_checks import (
    GIB,
    Devices,
    Finding,
    Place,
    State,
    check_build_locks,
    check_devices,
    check_disk,
    check_job,
    check_limits,
    check_mpi,
    check_network,
    check_ranks,
    check_run,
    check_shards,
    check_shared_memory,
    check_versions,
    extension_folder,
    places,
)
from launcher.prepare import prepare
from tests.drawings import write_drawings

CPU_ONLY = Devices(gpus=(), has_bf16=False, nccl="", has_gloo=True, num_nvidia=0, torch_build="cpu")
EIGHT_GPUS = Devices(gpus=("H200",) * 8, has_bf16=True, nccl="2.27.3", has_gloo=True, num_nvidia=8, torch_build="13.0")


def states(findings: Sequence[Finding]) -> list[State]:
    return [finding.state for finding in findings]


def only(findings: Sequence[Finding]) -> Finding:
    """The one finding that is not ok."""
    wrong = [finding for finding in findings if finding.state != "ok"]
    assert len(wrong) == 1, findings
    return wrong[0]


def file_system(*, size: int = 100 * GIB, free: int = 100 * GIB, free_files: int = 10**6) -> Callable[[Path], Any]:
    block = 4096
    return lambda path: os.statvfs_result(
        (block, block, size // block, free // block, free // block, 10**7, free_files, free_files, 0, 255)
    )


# ---------------------------------------------------------------- findings and versions


@pytest.mark.parametrize(("state", "remedy"), [("error", ""), ("warning", ""), ("ok", "pip install it")])
def test_a_remedy_stands_with_every_fault_and_with_nothing_else(state: State, remedy: str) -> None:
    with pytest.raises(ValueError, match="remedy"):
        Finding(state, "MPI", "found", remedy)


def versions(tmp_path: Path, **changed: str | None) -> list[Finding]:
    """check_versions of a file that pins torch, deepspeed and an extra; `changed` is what is installed instead."""
    pins = tmp_path / "requirements.txt"
    pins.write_text("# tried together\ntorch==2.13.0\ndeepspeed==0.19.8\njsonargparse[signatures]==4.53.0\n-e .\n")
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


# ---------------------------------------------------------------- devices and MPI


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
        (Devices(**{**vars(CPU_ONLY), "num_nvidia": 2}), "warning", "the driver knows 2 NVIDIA GPUs, torch (cpu build)"),
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


@pytest.mark.parametrize(("tasks", "state"), [("", "warning"), ("1", "warning"), ("4", "error")])
def test_a_missing_mpi_library_is_found(tasks: str, state: State) -> None:
    environ = {**os.environ, "MPI4PY_LIBMPI": "/nowhere/libmpi.so"} | ({"OMPI_COMM_WORLD_SIZE": tasks} if tasks else {})
    finding = only(check_mpi(environ))
    assert finding.state == state
    assert finding.found.startswith("mpi4py finds no MPI library")
    assert "/nowhere/libmpi.so" in finding.found
    assert ("4 MPI tasks were started" in finding.found) == (state == "error")
    assert "apt install openmpi-bin" in finding.remedy


def test_a_library_that_aborts_the_process_is_found(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("import os; os.abort()")
    finding = only(check_mpi({**os.environ, "PYTHONPATH": str(tmp_path)}))
    assert finding.state == "warning"
    assert "ended with code -6" in finding.found


def test_a_library_that_hangs_is_found(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("import time; time.sleep(60)")
    finding = only(check_mpi({**os.environ, "PYTHONPATH": str(tmp_path)}, limit_s=1))
    assert finding.state == "warning"
    assert "not loaded within 1 s" in finding.found


def test_an_mpi_library_is_named(tmp_path: Path) -> None:
    code = "class rc: pass\nclass MPI:\n  Get_library_version = staticmethod(lambda: 'Open MPI v5.0.11, package: x\\0')\n"
    (tmp_path / "mpi4py.py").write_text(code)
    assert check_mpi({**os.environ, "PYTHONPATH": str(tmp_path)}) == [Finding("ok", "MPI", "Open MPI v5.0.11")]


# ---------------------------------------------------------------- disks and limits


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
        name="run folder", path=tmp_path / "new" / "run", least_bytes=GIB, enough_bytes=20 * GIB, other="choose another"
    )
    (finding,) = check_disk([place], statvfs=status)
    assert (finding.state, finding.subject) == (state, "run folder")
    assert str(place.path) in finding.found
    assert text in finding.found
    assert state == "ok" or (str(tmp_path) in finding.remedy and "choose another" in finding.remedy)


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    [(64, 64, 0, "warning"), (64, 64, 8, "error"), (512, 512, 8, "warning"), (4096, 4096, 8, "ok"), (4096, 3, 8, "error")],
)
def test_a_tiny_shared_memory_is_found(tmp_path: Path, size_mib: int, free_mib: int, num_gpus: int, state: State) -> None:
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
def test_a_low_limit_of_open_files_is_a_warning(tmp_path: Path, open_files: tuple[int, int], remedy: str) -> None:
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


# ---------------------------------------------------------------- build locks


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
    assert extension_folder({"TORCH_EXTENSIONS_DIR": "/scratch/e", "XDG_CACHE_HOME": "/x"}) == Path("/scratch/e")
    assert extension_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/torch_extensions")
    assert extension_folder({}, home=tmp_path) == tmp_path / ".cache/torch_extensions"


# ---------------------------------------------------------------- network and job


@pytest.mark.parametrize(
    ("variable", "value", "used"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=eth0", ["eth0"]),
        ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "eno,ib", ["ib0"]),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", ["eth0", "eth1", "ib0"]),
        ("NCCL_SOCKET_IFNAME", "^=eth", ["lo", "eth0", "eth1", "ib0"]),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", []),
        ("NCCL_SOCKET_IFNAME", "enp5s0", []),
        ("GLOO_SOCKET_IFNAME", "eth0", ["eth0"]),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", ["eth0", "ib0"]),
        ("GLOO_SOCKET_IFNAME", "eth0,ib1", []),
        ("GLOO_SOCKET_IFNAME", "eth", []),
    ],
)
def test_an_interface_that_does_not_exist_is_an_error(variable: str, value: str, used: list[str]) -> None:
    (finding,) = check_network({variable: value}, interfaces=["lo", "eth0", "eth1", "ib0"])
    if used:
        assert finding == Finding("ok", "network", f"{variable}={value}: {', '.join(used)}")
    else:
        assert finding.state == "error"
        assert f"{variable}={value}" in finding.found
        assert "lo, eth0, eth1, ib0" in finding.found
        assert f"unset {variable}" in finding.remedy


def test_interfaces_of_this_machine_are_asked_for() -> None:
    assert only(check_network({"NCCL_SOCKET_IFNAME": "=nosuch0"})).state == "error"
    assert states(check_network({"GLOO_SOCKET_IFNAME": "lo"})) == ["ok"]


def test_several_interfaces_and_none_named_is_a_note() -> None:
    (several,) = check_network({}, interfaces=["lo", "eth0", "ib0"])
    (one,) = check_network({}, interfaces=["lo", "eth0"])
    assert (several.state, one.state) == ("ok", "ok")
    assert ("NCCL_SOCKET_IFNAME" in several.found, "NCCL_SOCKET_IFNAME" in one.found) == (True, False)


SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


@pytest.mark.parametrize("environ", [{"MASTER_ADDR": "gpu003"}, SRUN], ids=["given", "from srun"])
def test_a_master_address_that_cannot_be_resolved_is_an_error(environ: dict[str, str]) -> None:
    def resolve(host: str, port: int) -> None:
        assert host == "gpu003"
        raise socket.gaierror(-2, "Name or service not known")

    finding = only(check_network(environ, interfaces=["lo"], resolve=resolve))
    assert (finding.state, finding.subject) == ("error", "MASTER_ADDR")
    assert "MASTER_ADDR=gpu003 cannot be resolved" in finding.found
    assert "export MASTER_ADDR=" in finding.remedy
    assert set(states(check_network(environ, interfaces=["lo"], resolve=lambda host, port: []))) == {"ok"}


def test_the_resolver_of_this_machine_is_asked() -> None:
    no_name = "x" * 64  # refused before anything is sent
    assert only(check_network({"MASTER_ADDR": no_name}, interfaces=["lo"])).state == "error"
    assert set(states(check_network({"MASTER_ADDR": "127.0.0.1"}))) == {"ok"}


def test_contradicting_variables_of_a_launcher_are_an_error() -> None:
    finding = only(check_job({"RANK": "0", "WORLD_SIZE": "2"}, num_gpus=0))
    assert finding.state == "error"
    assert "LOCAL_RANK missing" in finding.found
    assert "unset what is left over" in finding.remedy


@pytest.mark.parametrize(
    ("environ", "num_gpus", "expected"),
    [
        ({}, 8, ["ok"]),
        (SRUN, 8, ["ok"]),
        (SRUN, 0, ["ok"]),
        (SRUN, 1, ["ok", "error"]),  # --gpus-per-task: each task sees one GPU
        (SRUN | {"SLURM_NTASKS": "8"}, 8, ["ok", "warning"]),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "4"}, 8, ["ok", "warning"]),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, 8, ["ok"]),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_NNODES": "1"}, 4, ["ok", "error"]),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"},
            2,
            ["ok", "error"],
        ),
    ],
)
def test_tasks_are_compared_with_gpus(environ: dict[str, str], num_gpus: int, expected: list[State]) -> None:
    findings = check_job(environ, num_gpus=num_gpus)
    assert states(findings) == expected
    if expected[-1] != "ok":
        assert f"{num_gpus} GPUs visible" in findings[-1].found


# ---------------------------------------------------------------- ranks


LIMIT_S = 120 + os.getpid() / 1e7
"""Stands in the command of the ranks: those of a test that runs beside this one are not ours."""


def ranks_left_behind() -> list[list[str]]:
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if any(f"step_on_this_rank({LIMIT_S})" in word for word in command)]


def test_two_ranks_meet_and_take_a_step_and_compile_nothing(tmp_path: Path) -> None:
    environ = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "TORCHELASTIC_USE_AGENT_STORE": "True"}
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
    assert "2 on the CPU over gloo: all-reduce and one ZeRO-3 step" in found[0].found
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
    assert doctor_checks._first_failure(processes, time.monotonic() + 60) == 1


def test_ranks_that_take_too_long_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LIMIT_S", 1 + os.getpid() / 1e8)
    start = time.monotonic()
    finding = only(check_ranks(limit_s=LIMIT_S, log_folder=tmp_path))
    assert finding.state == "error"
    assert "not done within 1 s" in finding.found
    assert time.monotonic() - start < 20
    assert ranks_left_behind() == []


# ---------------------------------------------------------------- shards and runs


@pytest.fixture(scope="module")
def undamaged_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prepare(write_drawings(folder / "drawings").mmeb, folder / "out", rows_per_shard=10)
    return folder / "out"


@pytest.fixture
def shards(undamaged_shards: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", undamaged_shards, tmp_path / "shards"], check=True)
    return tmp_path / "shards"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def overwrite(path: Path) -> None:
    path.write_bytes(b"0" * path.stat().st_size)


def empty(path: Path) -> None:
    path.write_bytes(b"")


SHARD = "Shapes_VQA/Shapes_VQA-00000.tar"


def test_undamaged_shards_are_well(shards: Path) -> None:
    (finding,) = check_shards(str(shards))
    assert finding.state == "ok"
    assert "samples" in finding.found


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (SHARD, cut, "bytes, the manifest says"),
        (SHARD, Path.unlink, "shard is missing"),
        ("Shapes_VQA/index.arrow", cut, "index has"),
        ("manifest.json", cut, "damaged manifest"),
        ("manifest.json", Path.unlink, "no shards here"),
    ],
)
def test_damaged_shards_are_an_error(shards: Path, name: str, damage: Callable[[Path], None], text: str) -> None:
    damage(shards / name)
    finding = only(check_shards(str(shards)))
    assert finding.state == "error"
    assert text in finding.found
    assert name.removesuffix("manifest.json") in finding.found
    assert finding.remedy


def test_many_damaged_shards_are_counted(shards: Path) -> None:
    damaged = sorted(shards.glob("*/*.tar"))
    assert len(damaged) > 6
    for path in damaged:
        path.unlink()
    findings = check_shards(str(shards))
    assert len(findings) == 6
    assert findings[-1].found == f"{len(damaged) - 5} more of the kind"
    assert "verify.py" in findings[-1].remedy


def test_a_command_instead_of_a_folder_is_refused() -> None:
    assert only(check_shards("pipe:cat")).state == "error"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_remote_shards_are_asked_for_and_not_fetched(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(shards))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert states(check_shards(url)) == ["ok"]
            cut(shards / SHARD)
            changed = only(check_shards(url))
            (shards / SHARD).unlink()
            missing = only(check_shards(url))
        finally:
            server.shutdown()
            thread.join()
    assert f"{url}/{SHARD}" in changed.found
    assert "the manifest says" in changed.found
    assert "missing" in missing.found
    assert not (tmp_path / "home").exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it: checkpoints of steps 2 and 4 by two ranks."""
    folder = tmp_path / "run"
    for step in (2, 4):
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        for rank in range(2):
            torch.save({"state": torch.arange(9)}, checkpoint / f"random-{rank:05d}.pt")
            for part in ("optim", "model"):
                torch.save({"x": torch.arange(99)}, checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_{part}_states.pt")
        files = {path.name: f"{path.stat().st_size} bytes, sha256 {'0' * 64}" for path in checkpoint.iterdir()}
        state = {"step": step, "world_size": 2, "files": files, "data_plan": {}}
        (checkpoint / "state.json").write_text(json.dumps(state))
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(parse_train_arguments([]).config)))
    (folder / "deepspeed.json").write_text("{}")
    return folder


NEWEST = "checkpoints/step-000004"


def test_a_complete_run_is_well(run: Path) -> None:
    assert check_run(run) == [Finding("ok", "run", f"{run}: checkpoint of step 4 is complete")]


def test_a_run_without_checkpoint_is_well(run: Path) -> None:
    subprocess.run(["rm", "-r", run / "checkpoints"], check=True)
    assert check_run(run) == [Finding("ok", "run", f"{run}: no checkpoint yet")]


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("random-00001.pt", cut, "random-00001.pt: "),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", cut, "bytes, it was written with"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", empty, "model_states.pt: empty"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", Path.unlink, "optim_states.pt: missing"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", overwrite, "cut off or damaged"),
        ("state.json", cut, "state.json: cannot be read"),
        ("state.json", empty, "state.json: "),
    ],
)
def test_an_unreadable_checkpoint_is_an_error(run: Path, name: str, damage: Callable[[Path], None], text: str) -> None:
    damage(run / NEWEST / name)
    findings = check_run(run)
    assert findings
    for finding in findings:
        assert finding.state == "error"
        assert f"mv {run / NEWEST} {run / NEWEST}.damaged" in finding.remedy
        assert "then continues from step-000002" in finding.remedy
    assert text in findings[0].found


@pytest.mark.parametrize("part", ["optim_states", "model_states", "random"])
def test_a_checkpoint_that_was_never_whole_is_an_error(run: Path, part: str) -> None:
    checkpoint = run / NEWEST
    state = json.loads((checkpoint / "state.json").read_text())
    for path in checkpoint.glob(f"*{part}*"):
        path.unlink()
        del state["files"][path.name]
    (checkpoint / "state.json").write_text(json.dumps(state))
    findings = check_run(run)
    assert set(states(findings)) == {"error"}
    assert all(part in finding.found for finding in findings)


def test_the_remedy_for_a_damaged_checkpoint_works(run: Path) -> None:
    cut(run / NEWEST / "random-00000.pt")
    remedy = only(check_run(run)).remedy
    command = remedy[remedy.index("mv ") :].split(";")[0]
    subprocess.run(command, shell=True, check=True)
    assert check_run(run) == [Finding("ok", "run", f"{run}: checkpoint of step 2 is complete")]


def test_a_checkpoint_without_its_state_does_not_count(run: Path) -> None:
    (run / NEWEST / "state.json").unlink()
    finding = only(check_run(run))
    assert finding.state == "warning"
    assert "would continue from step 2" in finding.found
    (run / "checkpoints/step-000002/state.json").unlink()
    findings = check_run(run)
    assert states(findings) == ["error", "error"]
    assert "would begin anew" in findings[0].found


@pytest.mark.parametrize("absent", [["data_plan"], ["files"], ["data_plan", "files"]])
def test_a_checkpoint_of_an_older_version_is_not_to_be_thrown_away(run: Path, absent: list[str]) -> None:
    path = run / NEWEST / "state.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in absent}))
    finding = only(check_run(run))
    assert finding.state == "warning"
    assert f"{' and '.join(absent)} missing" in finding.found
    assert "mv" not in finding.remedy


def test_left_over_folders_are_a_note(run: Path) -> None:
    (run / "checkpoints/step-000006.partial").mkdir()
    findings = check_run(run)
    assert states(findings) == ["ok", "ok"]
    assert "step-000006.partial" in findings[1].found


@pytest.mark.parametrize("name", ["config.yaml", "deepspeed.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{not: [closed")])
def test_an_unreadable_configuration_is_an_error(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(run / name)
    finding = only(check_run(run))
    assert finding.state == "error"
    assert name in finding.remedy


def test_a_run_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert only(check_run(tmp_path / "absent")).state == "error"


# ---------------------------------------------------------------- the command


@pytest.fixture
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine without what its owner may have set, and with room enough."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "NCCL_", "GLOO_", "MASTER_")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    extensions = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    monkeypatch.setattr(doctor_checks, "check_disk", partial(check_disk, statvfs=file_system()))
    return extensions


def test_a_healthy_machine_is_well(healthy: Path, run: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--skip-ranks", "--run", str(run), "--shards", str(shards)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("0 errors, ")
    subjects = {line[9:25].strip() for line in lines[1:-1]}
    assert subjects >= {"versions", "GPUs", "MPI", "shared memory", "open files", "build locks", "network", "job"}
    assert subjects >= {"run", "shards", "TMPDIR", "shard cache"}
    assert "ranks" not in subjects


def test_the_table_has_columns(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--skip-ranks"])
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert len(lines) > 10
    for line in lines:
        assert line[:9].strip() in ("ok", "warning", "error")
        assert line[9] != " "
        assert line[24] == " "
        assert line[25] != " "


def test_a_long_line_is_folded_below_its_column() -> None:
    finding = Finding("error", "build lock", "every later start waits on it silently " * 3, "rm " + "x" * 100)
    assert "\n" not in doctor.table_line(finding, None)
    lines = doctor.table_line(finding, 80).splitlines()
    assert len(lines) > 2
    assert all(line.startswith(" " * 25) and line[25] != " " for line in lines[1:])
    assert all(len(line) <= 80 for line in lines if "xxx" not in line)
    assert any("x" * 100 in line for line in lines), "a path that is to be copied stays in one piece"


def test_an_error_is_exit_code_1_and_hides_nothing(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = healthy / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert doctor.main(["--skip-ranks"]) == 1
    out = capsys.readouterr().out
    assert f"-> rm {lock}" in out
    assert "\nok       job" in out


def test_a_check_that_crashes_hides_no_other(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise RuntimeError("boom\nof two lines")

    monkeypatch.setattr(doctor_checks.Devices, "of_this_machine", crash)
    assert doctor.main(["--skip-ranks"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("error    GPUs") and "RuntimeError: boom of two lines" in line for line in lines)
    assert any(line.startswith("ok       job") for line in lines)


@pytest.mark.parametrize(
    ("num_gpus", "started"),
    [(0, [{}]), (1, [{"num_ranks": 1, "on_gpus": True}, {}]), (8, [{"num_ranks": 2, "on_gpus": True}])],
)
def test_ranks_are_started_on_what_there_is(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, started: list[dict[str, Any]]
) -> None:
    calls: list[dict[str, Any]] = []

    def check(**settings: Any) -> list[Finding]:
        calls.append(settings)
        return [Finding("error", "ranks", "failed", "mend it")]

    monkeypatch.setattr(doctor_checks, "check_ranks", check)
    devices = Devices(**{**vars(EIGHT_GPUS), "gpus": ("H200",) * num_gpus})
    monkeypatch.setattr(doctor_checks.Devices, "of_this_machine", lambda: devices)
    assert doctor.main([]) == 1
    assert calls == started


def test_one_task_of_each_machine_reports(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (SRUN | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["--skip-ranks"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("SLURM_LOCALID", "0")
    doctor.main(["--skip-ranks"])
    assert "rank 1 of 16" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--nothing"], ["--run"], ["stray"]])
def test_wrong_arguments_are_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(argv)
    assert ended.value.code == 2
    assert "usage: doctor" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom launcher import doctor\ntry: doctor.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_it_speaks_where_torch_cannot_be_imported(healthy: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from launcher import doctor; sys.exit(doctor.main(['--skip-ranks']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1, result.stderr
    assert "error    GPUs" in result.stdout
    assert "torch" in result.stdout
    assert "\nok       shared memory" in result.stdout or "\nwarning  shared memory" in result.stdout
    assert "Traceback" not in result.stderr
