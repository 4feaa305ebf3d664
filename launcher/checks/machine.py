"""What the operating system gives a run, as `doctor` sees it: disks, /dev/shm, limits, locks of builds."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checks.finding import Finding, State

GIB = 2**30
LEAST_SHM_BYTES, ENOUGH_SHM_BYTES = GIB // 8, GIB
"""NCCL takes some 10 MiB for each pair of ranks; a container has 64 MiB unless configured otherwise."""
LEAST_FREE_FILES = 1000
ENOUGH_OPEN_FILES = 4096
OLD_LOCK_S = 600


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
        *(
            Place(name="run folder", path=run, **room, other="choose another --run_dir")
            for run in runs or [Path("runs")]
        ),
        Place(
            name="shard cache",
            path=home / ".cache/agff/shards",
            **room,
            other="choose another --data.cache.dir",
        ),
        Place(
            name="TMPDIR",
            path=temporary,
            least_bytes=GIB // 10,
            enough_bytes=GIB,
            other="export TMPDIR=FOLDER",
        ),
    ]


def check_disk(
    where: Iterable[Place], *, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
) -> list[Finding]:
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
            found, state, remedy = (
                f"{path}: {folder} is not writable",
                "error",
                f"chown or remount it, or {place.other}",
            )
        elif free < place.least_bytes:
            found, state = f"{found}; less than {_gib(place.least_bytes)} does not do", "error"
        elif status.f_files and status.f_favail < LEAST_FREE_FILES:
            found, state = (
                f"{found}, but only {status.f_favail} more files; at least {LEAST_FREE_FILES}",
                "error",
            )
        elif free < place.enough_bytes:
            found, state = f"{found}; {_gib(place.enough_bytes)} or more is advised", "warning"
        findings.append(Finding(state, place.name, found, "" if state == "ok" else remedy))
    return findings


def check_shared_memory(
    path: Path = Path("/dev/shm"),
    *,
    num_gpus: int = 0,
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs,
) -> list[Finding]:
    """Size of /dev/shm, which NCCL's ranks of one machine use. (Our loader does not.)"""
    if not path.is_dir():
        found = f"{path} is missing; processes share memory there"
        return [Finding("error", "shared memory", found, f"mkdir {path} && mount -t tmpfs tmpfs {path}")]
    status = statvfs(path)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{path}: {_gib(size)}, {_gib(free)} free"
    if min(size, free) >= ENOUGH_SHM_BYTES:
        return [Finding("ok", "shared memory", found)]
    state: State = "error" if num_gpus > 1 and min(size, free) < LEAST_SHM_BYTES else "warning"
    found += (
        f"; {_gib(ENOUGH_SHM_BYTES)} or more must be free, else NCCL and other loaders fail with `No space "
        "left`"
    )
    if size < ENOUGH_SHM_BYTES:
        remedy = (
            f"docker run --shm-size=16g, or --ipc=host; without a container: mount -o remount,size=50% {path}"
        )
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
        found = (
            f"at most {soft} (hard limit {_limit(hard)}); shards, workers and sockets want "
            f"{ENOUGH_OPEN_FILES}"
        )
        if hard == resource.RLIM_INFINITY or hard >= ENOUGH_OPEN_FILES:
            remedy = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
        else:
            remedy = "docker run --ulimit nofile=65536, or `* hard nofile 65536` in /etc/security/limits.conf"
        findings = [Finding("warning", "open files", found, remedy)]
    soft, _ = getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else []
    if adapters and soft != resource.RLIM_INFINITY:
        found = (
            f"at most {_gib(soft)}; InfiniBand ({', '.join(adapters)}) registers memory and wants no limit"
        )
        remedy = (
            "ulimit -l unlimited; docker run --ulimit memlock=-1; Slurm: "
            "PropagateResourceLimitsExcept=MEMLOCK"
        )
        findings.append(Finding("warning", "locked memory", found, remedy))
    else:
        why = "" if adapters else "; matters with InfiniBand only, which is absent"
        found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {_gib(soft)}{why}"
        findings.append(Finding("ok", "locked memory", found))
    return findings


def extension_folder(environ: Mapping[str, str], *, home: Path | None = None) -> Path:
    """Where torch builds operators."""
    if named := environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    home = Path.home() if home is None else home
    return Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "torch_extensions"


def _process_that_holds(path: Path) -> int | None:
    """A process of this machine that has the file open, as a build has its lock; None: none is visible."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samefile(link, path):
                return int(link.parts[2])
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return None


def check_build_locks(
    folder: Path,
    *,
    holder: Callable[[Path], int | None] = _process_that_holds,
    now: Callable[[], float] = time.time,
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
            found = (
                f"{lock}, {minutes:.0f} min old, is held by no process here: every later start waits on it "
                "silently"
            )
            findings.append(
                Finding(
                    "error",
                    "build lock",
                    found,
                    f"rm {lock} (unless another machine or container builds there now)",
                )
            )
        elif minutes * 60 > OLD_LOCK_S:
            found = (
                f"process {pid} has held {lock} for {minutes:.0f} min; builds take less than "
                f"{OLD_LOCK_S // 60}"
            )
            findings.append(Finding("warning", "build lock", found, f"if it hangs: kill {pid}; rm {lock}"))
        else:
            findings.append(Finding("ok", "build lock", f"process {pid} builds in {lock.parent} now"))
    return findings or [Finding("ok", "build locks", f"none in {folder}")]


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
