"""Counting faults: how many were made, and how many a run survived to the same result as an undisturbed
one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Campaign:
    """A tally of one test session; `pytest` prints it at its end."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()

    @contextmanager
    def against(self, name: str) -> Iterator[Callable[[], None]]:
        """Call what this yields for each fault; they count as survived when the block ends without an
        error."""
        made = 0

        def fault() -> None:
            nonlocal made
            made += 1
            self.faults[name] += 1

        yield fault
        self.survived[name] += made

    def lines(self) -> Iterator[str]:
        """The table; nothing when no fault was made."""
        for name, number in self.faults.items():
            yield f"{name}: {number} faults, {self.survived[name]} survived"
        if self.faults:
            yield f"ALL: {self.faults.total()} faults, {self.survived.total()} survived"


CAMPAIGN = Campaign()
