"""One process's place in the world, from the variables of four launchers."""

from __future__ import annotations

import socket

import pytest

from agff.engine import start_process_group
from agff.errors import ConfigError
from launcher.run.ranks import RankInfo, export, first_host, rank_from_environment

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu7", "MASTER_PORT": "1234"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_JOB_ID": "40123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
}


def info(rank: int, local_rank: int, world_size: int, addr: str, port: int) -> RankInfo:
    return RankInfo(
        rank=rank, local_rank=local_rank, world_size=world_size, master_addr=addr, master_port=port
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, info(3, 1, 4, "gpu7", 1234)),
        (MPIRUN, info(3, 3, 4, "127.0.0.1", 29500)),
        (SRUN, info(9, 1, 16, "gpu003", 12123)),
        ({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5"}, info(9, 1, 16, "head", 5)),
        ({**SRUN, **TORCHRUN}, info(3, 1, 4, "gpu7", 1234)),
        ({**SRUN, **MPIRUN}, info(3, 3, 4, "127.0.0.1", 29500)),
        ({}, info(0, 0, 1, "127.0.0.1", 0)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, info(0, 0, 1, "127.0.0.1", 29500)),
    ],
)
def test_each_launcher_is_understood(environ: dict[str, str], expected: RankInfo) -> None:
    assert rank_from_environment(environ) == expected


def test_batch_shell_of_a_job_is_a_world_of_one() -> None:
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    assert rank_from_environment(batch).world_size == 1


def test_all_ranks_of_a_step_meet_at_the_same_place() -> None:
    places = set()
    for rank in range(16):
        environ = {**SRUN, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 8)}
        found = rank_from_environment(environ)
        assert (found.rank, found.local_rank) == (rank, rank % 8)
        places.add((found.master_addr, found.master_port, found.world_size))
    assert len(places) == 1


def test_exported_variables_read_back_the_same() -> None:
    environ = dict(SRUN)
    export(rank_from_environment(SRUN), environ)
    assert rank_from_environment(environ) == rank_from_environment(SRUN)
    assert environ["MASTER_PORT"] == "12123"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, r"found RANK=0, but LOCAL_RANK and WORLD_SIZE missing"),
        ({"WORLD_SIZE": "8", **SRUN}, r"found WORLD_SIZE=8, but RANK and LOCAL_RANK missing"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, r"OMPI_COMM_WORLD_SIZE missing; mpirun sets"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, r"SLURM_LOCALID and SLURM_NTASKS missing; srun sets"),
        ({**TORCHRUN, "RANK": "4"}, r"RANK=4, LOCAL_RANK=1, WORLD_SIZE=4 contradict each other"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, r"RANK=3, LOCAL_RANK=4, WORLD_SIZE=4 contradict each other"),
        ({**TORCHRUN, "RANK": "-1"}, r"RANK='-1' is not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, r"MASTER_PORT='http' is not a whole number"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, r"WORLD_SIZE=2, but MASTER_ADDR is not set"),
        (
            {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            r"MASTER_ADDR is not set.*mpirun: -x MASTER_ADDR=HOST",
        ),
    ],
)
def test_partial_or_contradictory_variables_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rank_from_environment(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[003-010,12],login", "gpu003"),
        ("gpu[5,7-9]", "gpu5"),
        ("rack[1-2]node[3-4].example", "rack1node3.example"),
        ("", ""),
    ],
)
def test_first_host_of_a_slurm_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_cannot_meet_name_the_port(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    """Rank 0 finds its port taken; rank 1 finds nobody there."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if rank == "0":
            other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        message = (
            rf"^MASTER_PORT={port} is taken .*export MASTER_PORT="
            if rank == "0"
            else rf"^the ranks cannot meet at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: "
        )
        with pytest.raises(ConfigError, match=message):
            start_process_group(0, timeout_s=1)
