"""Who am I: one place that turns what torchrun, deepspeed, mpirun or srun say into RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_*.

DeepSpeed reads these five variables and never SLURM_*; without them it would start MPI discovery or a world
of one.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from agff.errors import ConfigError

DEFAULT_PORT = 29500
"""torch's and DeepSpeed's own default."""

ANY_FREE_PORT = 0
"""For a world of one, which meets nobody: two such runs on one machine do not collide."""

_EXPLICIT = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """This process among all of them, and where they meet."""

    rank: int
    local_rank: int
    """Among the processes of this machine: the index of its GPU."""
    world_size: int
    master_addr: str
    master_port: int


def rank_from_environment(environ: Mapping[str, str]) -> RankInfo:
    """The rank that the environment describes; without a launcher a world of one. Pure; raises ConfigError.

    RANK, LOCAL_RANK and WORLD_SIZE (torchrun, deepspeed) win. Then Open MPI's variables, which are also set
    inside a Slurm job when mpirun was called there. Slurm's own count only inside a step that srun started:
    in a batch script or an `salloc` shell they describe the whole job, and one process would wait for ranks
    that nobody starts.
    """
    if any(name in environ for name in _EXPLICIT):
        return _rank_info(environ, _EXPLICIT, "torchrun or deepspeed", addr=None, port=DEFAULT_PORT)
    if any(name in environ for name in _OPEN_MPI):
        is_one_machine = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environ.get("OMPI_COMM_WORLD_SIZE")
        return _rank_info(
            environ, _OPEN_MPI, "mpirun", addr="127.0.0.1" if is_one_machine else None, port=DEFAULT_PORT
        )
    if "SLURM_STEP_ID" in environ:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        # ranks of one job must agree and jobs on one machine must not: the job id decides; below the
        # ephemeral ports
        port = 12000 + _whole_number(environ, "SLURM_JOB_ID", "srun", default=0) % 20000
        return _rank_info(environ, _SLURM, "srun", addr=first_host(nodes) or None, port=port)
    return RankInfo(
        rank=0,
        local_rank=0,
        world_size=1,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_whole_number(environ, "MASTER_PORT", "the environment", default=ANY_FREE_PORT),
    )


def export(info: RankInfo, environ: MutableMapping[str, str]) -> None:
    """Write the five variables that torch and DeepSpeed read."""
    environ.update(
        RANK=str(info.rank),
        LOCAL_RANK=str(info.local_rank),
        WORLD_SIZE=str(info.world_size),
        MASTER_ADDR=info.master_addr,
        MASTER_PORT=str(info.master_port),
    )


def free_port() -> int:
    """A port of this machine that nobody uses now: a fixed one would let two groups of ranks on one machine
    collide."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_host(nodelist: str) -> str:
    """The first name of a Slurm host list: `gpu[003-010,12],login` -> `gpu003`; "" for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group(0)) if first else ""


def _rank_info(
    environ: Mapping[str, str], names: tuple[str, str, str], launcher: str, *, addr: str | None, port: int
) -> RankInfo:
    """The three variables of one launcher, checked together; MASTER_ADDR and MASTER_PORT win over `addr` and
    `port`."""
    if missing := [name for name in names if name not in environ]:
        found = ", ".join(f"{name}={environ[name]}" for name in names if name in environ)
        raise ConfigError(
            f"found {found}, but {' and '.join(missing)} missing; {launcher} sets {', '.join(names)} "
            "together: start with one of these launchers, or unset what is left over"
        )
    rank, local_rank, world_size = (_whole_number(environ, name, launcher) for name in names)
    if not max(rank, local_rank) < world_size:
        raise ConfigError(
            f"{', '.join(f'{name}={environ[name]}' for name in names)} contradict each other: "
            "both ranks are below the number of ranks"
        )
    addr = environ.get("MASTER_ADDR") or addr or ("127.0.0.1" if world_size == 1 else None)
    if addr is None:
        raise ConfigError(
            f"{names[2]}={world_size}, but MASTER_ADDR is not set, so the ranks cannot meet; "
            "export it as the host name of rank 0 (mpirun: -x MASTER_ADDR=HOST)"
        )
    return RankInfo(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        master_addr=addr,
        master_port=_whole_number(environ, "MASTER_PORT", launcher, default=port),
    )


def _whole_number(environ: Mapping[str, str], name: str, launcher: str, *, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is not a whole number; {launcher} sets it, do not set it by hand")
    return int(text)
