"""MPI libraries, interfaces and variables of launchers are made up; the machine itself is only asked."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from launcher.checks.finding import Finding, State
from launcher.checks.job import check_job, check_mpi, check_network
from tests.launcher.checks.test_finding import only, states


@pytest.mark.parametrize(("tasks", "state"), [("", "warning"), ("1", "warning"), ("4", "error")])
def test_a_missing_mpi_library_is_found(tasks: str, state: State) -> None:
    environ = {**os.environ, "MPI4PY_LIBMPI": "/nowhere/libmpi.so"} | (
        {"OMPI_COMM_WORLD_SIZE": tasks} if tasks else {}
    )
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
    code = (
        "class rc: pass\nclass MPI:\n  Get_library_version = staticmethod(lambda: 'Open MPI v5.0.11, "
        "package: x\\0')\n"
    )
    (tmp_path / "mpi4py.py").write_text(code)
    assert check_mpi({**os.environ, "PYTHONPATH": str(tmp_path)}) == [
        Finding("ok", "MPI", "Open MPI v5.0.11")
    ]


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
        (SRUN, 1, ["ok", "warning"]),  # --gpus-per-task: each task sees one GPU
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
