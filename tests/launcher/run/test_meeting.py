"""How ranks stop together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from agff.errors import AgffError, ConfigError, StorageError
from launcher.run import meeting
from launcher.run.meeting import from_first_rank, together


@pytest.mark.parametrize(
    ("error", "raised", "others"),
    [
        (ConfigError("no"), ConfigError, "no"),
        (FileNotFoundError(2, "No such file", "a.txt"), StorageError, "a.txt: No such file"),
        (
            torch.OutOfMemoryError("too little"),
            torch.OutOfMemoryError,
            "rank 0: OutOfMemoryError: too little",
        ),
        (ValueError("a fault of ours"), ValueError, "rank 0: ValueError: a fault of ours"),
    ],
)
@pytest.mark.parametrize("call", [together, from_first_rank])
def test_whatever_is_raised_on_one_rank_reaches_the_others(
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[Callable[[], None]], None],
    error: Exception,
    raised: type[Exception],
    others: str,
) -> None:
    told: list[str] = []

    def shared(found: AgffError | None) -> None:
        told.append(str(found))
        if found is not None:
            raise found

    def work() -> None:
        raise error

    monkeypatch.setattr(meeting, "raise_together", shared)
    with pytest.raises(raised):
        call(work)
    assert told == [others]
