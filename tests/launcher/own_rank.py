"""A command's work on one rank of a test, in small blocks, and on a disk that is full after some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from agff.engine import start_process_group
from agff.errors import AgffError
from launcher.run.ranks import RankInfo


def outcome_on_this_rank(
    on_this_rank: Callable[..., None],
    arguments: Any,
    sizes: Mapping[tuple[Any, str], int],
    *,
    works: tuple[Any, str],
    fail_after: int | None,
) -> str | None:
    """What the command raised for the user, if anything.

    sizes: of blocks, by (module, name). works, (owner, name): the function that a block is made by, and
    fail_after: how many of its calls succeed on the last rank."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world_size > 1:
        start_process_group(rank)
    info = RankInfo(rank=rank, local_rank=rank, world_size=world_size, master_addr="127.0.0.1", master_port=0)
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), size in sizes.items():
            patch.setattr(module, name, size)
        if fail_after is not None and rank == world_size - 1:
            patch.setattr(*works, _failing(getattr(*works), fail_after))
        try:
            on_this_rank(arguments, info, torch.device("cpu"))
        except AgffError as error:
            return str(error)
    return None


def _failing(right: Callable[..., Any], fail_after: int) -> Callable[..., Any]:
    calls = [0]

    def failing(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > fail_after:
            raise OSError("no space left on device")
        return right(*arguments, **named)

    return failing
