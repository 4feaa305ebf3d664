"""Real ranks for tests: spawned processes that meet over gloo and a file, with a time limit."""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    worker: Callable[..., Any],
    *arguments: Any,
    world_size: int,
    timeout_s: float = 240,
    on_gpus: bool = False,
) -> list[Any]:
    """worker(*arguments) in `world_size` new processes that form one gloo group; what each returned, in rank
    order. on_gpus: an NCCL group, a GPU for each.

    worker must be importable (top level of a test module) and return picklable values without tensors that
    need a GPU.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [
            context.Process(
                target=_rank, args=(worker, arguments, rank, world_size, store, results, on_gpus), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            returned = [results.get(timeout=timeout_s) for _ in processes]
        except queue.Empty:
            raise TimeoutError(
                f"{worker.__name__} on {world_size} ranks did not end within {timeout_s} s"
            ) from None
        finally:
            for process in processes:
                process.join(timeout=20)
                process.kill()
    failures = [f"rank {rank}:\n{error}" for rank, _, error in sorted(returned, key=lambda r: r[0]) if error]
    assert not failures, "\n".join(failures)
    return [pickle.loads(value) for _, value, _ in sorted(returned, key=lambda r: r[0])]


def _rank(
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    store: Path,
    results: Any,
    on_gpus: bool,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        DS_ACCELERATOR="cuda" if on_gpus else "cpu",
    )
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(rank)
    # DeepSpeed calls collectives by names torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=600 if on_gpus else 90),
        )
        value = worker(*arguments)
        dist.barrier()
        # bytes: tensors would travel as handles of a dead process
        results.put((rank, pickle.dumps(value), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
