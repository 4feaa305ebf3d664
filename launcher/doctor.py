"""`python launcher/doctor.py`: will a run work on this machine? One line a finding, with what to type."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # started by a `python` in which perhaps nothing of ours is installed
    sys.path.insert(0, str(Path(__file__).parent.parent))

# These import torch and our other packages when they check: doctor must also report where that fails.
from launcher.checks.data import check_run, check_shards
from launcher.checks.finding import Finding, one_line
from launcher.checks.job import check_job, check_mpi, check_network
from launcher.checks.machine import (
    check_build_locks,
    check_disk,
    check_limits,
    check_shared_memory,
    extension_folder,
    places,
)
from launcher.checks.ranks import check_ranks
from launcher.checks.software import Devices, check_devices, check_versions

ABOUT = """\
Check this machine, and the job it is called in, before a run does: versions, GPUs, MPI, disks, /dev/shm,
limits, locks that a killed build left, network, Slurm, two ranks that take a step under ZeRO-1, 2 and 3 (on
GPUs over NCCL, in bf16); the shards and run folders that you name.

In a job, start it like the run (srun or mpirun python launcher/doctor.py); one task of each machine reports.

Exit code 0: nothing found that breaks a run; 1: at least one error; 2: wrong arguments.
"""
SUBJECT_WIDTH = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="doctor", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, nargs="+", action="extend", default=[], help="run folders to check"
    )
    parser.add_argument(
        "--shards", help="folder or URL of shards to check: presence and sizes (launcher/verify.py reads all)"
    )
    parser.add_argument("--skip-ranks", action="store_true", help="start no ranks (they take about 20 s)")
    arguments = parser.parse_args(argv)
    if not _reports(os.environ):
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    sys.stdout.write(f"doctor on {socket.gethostname()}\n")
    counts = dict.fromkeys(("ok", "warning", "error"), 0)
    for finding in findings(arguments.run, arguments.shards, with_ranks=not arguments.skip_ranks):
        counts[finding.state] += 1
        sys.stdout.write(table_line(finding, width) + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} ok\n")
    return 1 if counts["error"] else 0


def findings(runs: Sequence[Path], shards: str | None, *, with_ranks: bool) -> Iterator[Finding]:
    """What each check finds about this machine, one check after the other."""
    yield from _guarded("versions", check_versions)
    num_gpus = 0

    def check_own_devices() -> list[Finding]:
        nonlocal num_gpus
        devices = Devices.of_this_machine()
        num_gpus = len(devices.gpus)
        return check_devices(devices)

    yield from _guarded("GPUs", check_own_devices)
    named: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("MPI", partial(check_mpi, os.environ)),
        ("disk", lambda: check_disk(places(os.environ, runs))),
        ("shared memory", partial(check_shared_memory, num_gpus=num_gpus)),
        ("limits", check_limits),
        ("build locks", lambda: check_build_locks(extension_folder(os.environ))),
        ("network", partial(check_network, os.environ)),
        ("job", partial(check_job, os.environ, num_gpus=num_gpus)),
    ]
    if shards is not None:
        named.append(("shards", partial(check_shards, shards)))
    named += [("run", partial(check_run, run)) for run in runs]
    if with_ranks and num_gpus:
        named.append(("ranks", partial(check_ranks, num_ranks=min(2, num_gpus), on_gpus=True)))
    if with_ranks and num_gpus < 2:
        named.append(("ranks", check_ranks))
    for name, check in named:
        yield from _guarded(name, check)


def _guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; one that itself fails is a finding and hides no other."""
    try:
        return check()
    except Exception as error:
        found = f"the check failed: {type(error).__name__}: {one_line(error)}"
        return [
            Finding("error", name, found, "fix the errors above; if none explains it, report this as a bug")
        ]


def table_line(finding: Finding, width: int | None) -> str:
    """`state  subject  found -> remedy`; folded below the third column when a terminal's width is given."""
    start = f"{finding.state:<8} {finding.subject:<{SUBJECT_WIDTH}} "
    text = finding.found + (f" -> {finding.remedy}" if finding.remedy else "")
    if width is None or len(start) + 20 > width:
        return start + text
    return textwrap.fill(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _reports(environ: Mapping[str, str]) -> bool:
    """Is this the task of its machine that reports? Wrong variables are a finding, no reason to be silent."""
    local = next(
        (environ[n] for n in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID") if n in environ),
        "0",
    )
    return local == "0" or not local.isdecimal()


if __name__ == "__main__":
    raise SystemExit(main())
