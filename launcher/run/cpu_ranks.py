"""Several ranks on a machine without accelerators, where DeepSpeed's launcher starts only one process.

That one has imported everything and checked the run. It forks the ranks, which begin with all that, and
watches them: it passes signals on, ends all when one fails, and takes their exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

import torch

from launcher.run.ranks import RankInfo, free_port
from launcher.run.stop_request import EXIT_CODE, SIGNALS

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""
GRACE_S = 10.0
"""A rank that failed has said why; the others have this long to end by themselves."""
_LOOK_AGAIN_S = 0.2
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def before_cpu_ranks() -> None:
    """Call it before any tensor is computed: a thread pool that was used here is dead in a forked process,
    which would wait for it forever."""
    torch.set_num_threads(1)


def run_cpu_ranks(num_ranks: int, train: Callable[[RankInfo], int]) -> int:
    """`train(rank)` in `num_ranks` processes, each with its share of the cores (or OMP_NUM_THREADS).

    Returns the exit code of all: that of the first of the ranks that failed first, else 75 when they were
    stopped, else 0.
    """
    # torchrun's agent keeps a store of its own at another port
    for name in ("CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    os.environ["LOCAL_SIZE"] = str(num_ranks)  # DeepSpeed takes it for the number of its devices
    port, fork, parent = free_port(), multiprocessing.get_context("fork"), os.getpid()

    def work(rank: int) -> None:
        _die_with(parent, name=f"agff rank {rank}")
        torch.set_num_threads(_threads_of_a_rank(num_ranks))
        info = RankInfo(
            rank=rank, local_rank=rank, world_size=num_ranks, master_addr="127.0.0.1", master_port=port
        )
        raise SystemExit(train(info))

    ranks = [fork.Process(target=work, args=(rank,)) for rank in range(num_ranks)]
    try:
        for rank in ranks:
            rank.start()
        return _Watch(ranks).until_all_have_ended()
    finally:  # after an error here: Python would wait for the ranks, which go on
        for rank in ranks:
            if rank.pid is not None and rank.is_alive():
                rank.kill()


class _Watch:
    """The processes of the ranks until their end."""

    def __init__(self, ranks: Sequence[BaseProcess]) -> None:
        self._ranks = ranks
        self._interrupted = False
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGINT, self._interrupt)

    def until_all_have_ended(self) -> int:
        failed, deadline = 0, float("inf")
        while True:
            running = [rank for rank in self._ranks if rank.is_alive()]
            codes = [_exit_code(rank) for rank in self._ranks if rank not in running]
            if not failed and (failed := next((code for code in codes if code not in (0, EXIT_CODE)), 0)):
                deadline = time.monotonic() + GRACE_S
            if not running:
                return INTERRUPTED if self._interrupted else failed or max(codes)
            if self._interrupted or time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            wait([rank.sentinel for rank in running], timeout=_LOOK_AGAIN_S)

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.is_alive() and rank.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(rank.pid, number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._send(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True


def _die_with(parent: int, *, name: str) -> None:
    """The kernel kills this process when its parent is gone. `name` is what `ps` and `top` show.

    Ctrl-C reaches all processes of a terminal: the parent alone answers it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(_PR_SET_NAME, name.encode())
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _threads_of_a_rank(num_ranks: int) -> int:
    """OMP_NUM_THREADS, of whose levels the first counts; or its share of the cores that we may use."""
    if wanted := os.environ.get("OMP_NUM_THREADS"):
        return int(wanted.split(",")[0])
    # a job or a container may be given a part of the machine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_ranks)


def _exit_code(rank: BaseProcess) -> int:
    """Of a process that has ended; 128 + signal as shells have it."""
    code = rank.exitcode or 0
    return code if code >= 0 else 128 - code
