"""Contenders that take turns: each is one or more ranks in processes of its own, which wait while others run.

What else the machine does meets all of them alike, so that their ratio is good where their times are not.
ZeRO-3 replaces `torch.nn.functional.linear` in its whole process: a bare loop needs a process of its own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Cases = Mapping[str, Callable[[], object]]
"""Name -> what is timed; collective where there are several ranks."""
LIMIT_S = 600


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of doing it."""

    name: str
    make: Callable[..., Cases]
    """Called once in each rank; importable."""
    arguments: tuple[Any, ...]
    num_ranks: int


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of two lists of times that were taken in turn."""

    median: float
    low: float
    """A quarter of the rounds is below."""
    high: float

    @classmethod
    def of(cls, times: Sequence[float], others: Sequence[float]) -> Ratio:
        """times / others, round by round."""
        return cls.of_rounds([time / other for time, other in zip(times, others, strict=True)])

    @classmethod
    def of_rounds(cls, ratios: Sequence[float]) -> Ratio:
        """Of one ratio a round."""
        found = sorted(ratios)
        quarter = len(found) // 4
        return cls(median=statistics.median(found), low=found[quarter], high=found[-1 - quarter])


def take_turns(
    contenders: Sequence[Contender], *, rounds: int, repeats: int
) -> dict[tuple[str, str], list[float]]:
    """(contender, case) -> seconds of one call in each round, `repeats` calls a round; every other round runs
    backwards."""
    times: dict[tuple[str, str], list[float]] = {}
    with _started(contenders) as running:
        turns = [
            (name, case) for case in _cases(running) for name, (_, cases) in running.items() if case in cases
        ]
        for number in range(rounds):
            for name, case in turns if number % 2 == 0 else reversed(turns):
                pipes = running[name][0]
                for pipe in pipes:
                    pipe.send((case, repeats))
                seconds = max(_answer(pipe, name) for pipe in pipes)
                times.setdefault((name, case), []).append(seconds / repeats)
    return times


def _cases(running: Mapping[str, tuple[list[Connection], list[str]]]) -> list[str]:
    return list(dict.fromkeys(case for _, cases in running.values() for case in cases))


@contextmanager
def _started(contenders: Sequence[Contender]) -> Iterator[dict[str, tuple[list[Connection], list[str]]]]:
    """Name -> (a pipe to each rank, its cases), when all have warmed up."""
    context = mp.get_context("spawn")
    processes, pipes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for contender in contenders:
                pipes[contender.name] = []
                for rank in range(contender.num_ranks):
                    here, there = context.Pipe()
                    arguments = (contender, rank, Path(folder) / contender.name, there)
                    processes.append(context.Process(target=_rank, args=arguments, daemon=True))
                    processes[-1].start()
                    pipes[contender.name].append(here)
            yield {
                name: (of_ranks, max(_answer(pipe, name) for pipe in of_ranks))
                for name, of_ranks in pipes.items()
            }
            for pipe in [pipe for of_ranks in pipes.values() for pipe in of_ranks]:
                pipe.send(None)
            for process in processes:
                process.join(timeout=60)
        finally:
            for process in processes:
                process.kill()


def _answer(pipe: Connection, name: str) -> Any:
    if not pipe.poll(LIMIT_S):
        raise TimeoutError(f"{name} did not answer within {LIMIT_S} s")
    answer = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(f"{name}:\n{answer}")
    return answer


def _rank(contender: Contender, rank: int, store: Path, orders: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(contender.num_ranks), MASTER_ADDR="127.0.0.1"
    )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // contender.num_ranks))
    # DeepSpeed calls collectives by names torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=contender.num_ranks
        )
        cases = contender.make(*contender.arguments)
        for run in cases.values():
            run()
        orders.send(list(cases))
        while (order := orders.recv()) is not None:
            case, repeats = order
            dist.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                cases[case]()
            dist.barrier()
            orders.send(time.perf_counter() - start)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        orders.send(traceback.format_exc())
        raise SystemExit(1) from None
