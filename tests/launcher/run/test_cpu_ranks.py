"""Ranks that the first process forks: exit codes, signals, threads, and that none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

from launcher.run import cpu_ranks
from launcher.run.cpu_ranks import INTERRUPTED, before_cpu_ranks, run_cpu_ranks
from launcher.run.ranks import RankInfo, export
from launcher.run.stop_request import EXIT_CODE, StopRequest

pytestmark = pytest.mark.timeout(60)


def started(train: Callable[[RankInfo], int], *, grace_s: float = 20.0) -> BaseProcess:
    """A process that runs two ranks as launcher/train.py does."""

    def first_process() -> None:
        cpu_ranks.GRACE_S = grace_s
        before_cpu_ranks()
        raise SystemExit(run_cpu_ranks(2, train))

    process = multiprocessing.get_context("fork").Process(target=first_process)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int | None:
    process.join(30)
    return process.exitcode


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((EXIT_CODE, EXIT_CODE), EXIT_CODE),
        ((2, 2), 2),
        ((0, 1), 1),
        ((1, EXIT_CODE), 1),
        ((0, -signal.SIGKILL), 128 + signal.SIGKILL),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(codes: tuple[int, int], expected: int) -> None:
    def train(rank: RankInfo) -> int:
        if codes[rank.rank] < 0:
            os.kill(os.getpid(), -codes[rank.rank])
        return codes[rank.rank]

    assert exit_code(started(train)) == expected


def test_an_error_in_the_first_process_ends_the_ranks(tmp_path: Path) -> None:
    def first_process() -> None:
        cpu_ranks._Watch.until_all_have_ended = lambda watch: 1 // 0  # type: ignore[method-assign]
        run_cpu_ranks(2, lambda rank: time.sleep(50) or 0)

    process = multiprocessing.get_context("fork").Process(target=first_process)
    process.start()
    assert exit_code(process) == 1, "it does not wait for them"


def test_what_a_launcher_left_in_the_environment_does_not_mislead_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `torchrun --nproc_per_node 1`, whose agent keeps the store; and levels of threads."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")

    def train(rank: RankInfo) -> int:
        export(rank, os.environ)
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return 0 if torch.get_num_threads() == 1 else 1

    assert exit_code(started(train)) == 0


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_ends_the_one_that_waits_for_it(failing: int) -> None:
    def train(rank: RankInfo) -> int:
        if rank.rank != failing:
            time.sleep(50)
        return 2

    assert exit_code(started(train, grace_s=0.1)) == 2


def test_an_exception_is_printed_and_is_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    def train(rank: RankInfo) -> int:
        raise RuntimeError(f"the roof fell in on {rank.rank}")

    assert exit_code(started(train)) == 1
    errors = capfd.readouterr().err
    assert "the roof fell in on 0" in errors
    assert "the roof fell in on 1" in errors


def listening(folder: Path) -> Callable[[RankInfo], int]:
    """Ranks that wait to be asked to stop, and say when they do."""

    def train(rank: RankInfo) -> int:
        stop = StopRequest()
        stop.listen()
        (folder / f"{rank.rank}-{os.getpid()}").touch()
        while not stop:
            time.sleep(0.01)
        return EXIT_CODE

    return train


def pids(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_reaches_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    process = started(listening(tmp_path))
    wait_for(lambda: len(pids(tmp_path)) == 2)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert exit_code(process) == EXIT_CODE


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_rank_outlives_the_first_process(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """After Ctrl-C, which a terminal sends to all of them, and when the first one is killed."""
    process = started(listening(tmp_path))
    wait_for(lambda: len(pids(tmp_path)) == 2)
    ranks = [psutil.Process(pid) for pid in pids(tmp_path)]
    assert {rank.name() for rank in ranks} == {"agff rank 0", "agff rank 1"}
    assert process.pid is not None
    for pid in (*([] if number == signal.SIGKILL else pids(tmp_path)), process.pid):
        os.kill(pid, number)
    assert exit_code(process) == code
    wait_for(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks))


COMPUTES = """
import os
import sys

import torch

from launcher.run.cpu_ranks import before_cpu_ranks, run_cpu_ranks
from launcher.run.ranks import export, rank_from_environment


def train(rank):
    environ = {}
    export(rank, environ)
    assert rank_from_environment(environ) == rank
    assert "CROSS_SIZE" not in os.environ
    assert torch.ones(2_000_000).add(1).sum() == 4_000_000
    place = f"{rank.rank} of {rank.world_size} at {rank.master_addr}:{rank.master_port}"
    with open(f"{sys.argv[1]}/{rank.rank}", "w") as file:
        file.write(f"{place}, {torch.get_num_threads()} threads")
    return 0


before_cpu_ranks()
sys.exit(run_cpu_ranks(2, train))
"""
"""A program by itself: the thread pool of the process that runs the tests is dead in what it forks."""


def test_each_rank_has_its_place_and_its_share_of_the_cores(tmp_path: Path) -> None:
    """And can use it: a thread pool of the first process would be dead here, and this would hang."""
    environ = {**os.environ, "OMP_NUM_THREADS": "2", "CROSS_SIZE": "1"}
    subprocess.run([sys.executable, "-c", COMPUTES, tmp_path], env=environ, timeout=50, check=True)
    first, second = ((tmp_path / name).read_text() for name in "01")
    assert first.startswith("0 of 2 at 127.0.0.1:")
    assert first.endswith(", 2 threads")
    assert second == first.replace("0 of", "1 of", 1)
