"""Ranks of a command that needs no DeepSpeed engine: how they meet, and how they stop together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from agff.collectives import raise_together, rank, world_size
from agff.errors import AgffError, StorageError
from launcher.run.ranks import RankInfo, export

MEETING_S = 7 * 24 * 3600
"""A rank that is done waits this long for the others."""

Value = TypeVar("Value")


def meet(info: RankInfo) -> torch.device:
    """This rank's device; a process group of all ranks where there are several. Collective. Raises
    ConfigError when they cannot meet."""
    if info.world_size == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from agff.engine import start_process_group  # with DeepSpeed, which one process does without

    export(info, os.environ)
    return start_process_group(info.local_rank, timeout_s=MEETING_S)


def leave() -> None:
    """Leave the process group in good order, all ranks together, where there is one. Collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def together(work: Callable[[], Value]) -> Value:
    """What `work` returns on this rank; the error of any rank is raised by all, an OSError as StorageError.
    One that nobody expects, as too little memory, is raised as it is where it happens, and ends the others.
    Collective; `work` calls no collective."""
    error: AgffError | None = None
    try:
        value = work()
    except AgffError as caught:
        error = caught
    except OSError as caught:
        error = StorageError(f"{caught.filename or 'input or output'}: {caught.strerror or caught}")
    except Exception as caught:  # the others would wait for this rank for MEETING_S
        with contextlib.suppress(AgffError):
            raise_together(AgffError(f"rank {rank()}: {type(caught).__name__}: {caught}"))
        raise
    raise_together(error)
    return value


def from_first_rank(work: Callable[[], Value]) -> Value:
    """What `work`, which runs on rank 0 alone, returns, on every rank; its error is raised by all. A small
    value that can be pickled. Collective."""
    values: list[Any] = [together(lambda: work() if rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
