"""A folder that one command writes at a time, with any number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.claim import claimed
from launcher.run.meeting import from_first_rank
from launcher.run.ranks import RankInfo

CLAIM_FILE = "writing.lock"
"""Names the process that writes the folder."""


@contextlib.contextmanager
def taken(folder: Path, rank: RankInfo) -> Iterator[None]:
    """Rank 0 makes and holds the folder for all ranks; while another command writes it, all wait. Collective.
    Raises StorageError on all ranks."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claimed(folder / CLAIM_FILE))

        from_first_rank(take)
        try:
            yield
        finally:
            if rank.rank == 0:
                (folder / CLAIM_FILE).unlink(missing_ok=True)
