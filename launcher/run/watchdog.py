"""Naming a rank that is stalled: which step, doing what, since when, with the stacks of all its threads."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from types import TracebackType


class Watchdog:
    """Reports when this rank has not reached its next mark for `after_s` seconds; it never ends anything.

    In a stalled job every rank will report: most of them wait for the others inside a collective, the one
    whose stack is elsewhere is to blame.
    """

    def __init__(self, rank: int, *, after_s: float) -> None:
        self._rank, self._after_s = rank, after_s
        self._what, self._since = "starting", time.monotonic()
        self._spoken = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def mark(self, what: str) -> None:
        """Say what this rank does from now on."""
        self._what, self._since, self._spoken = what, time.monotonic(), False

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._after_s / 4)):
            stalled = time.monotonic() - self._since
            if stalled < self._after_s or self._spoken:
                continue
            self._spoken = True
            sys.stderr.write(
                f"rank {self._rank} is stalled: {self._what} for {stalled:.0f} s; stacks of its threads:\n"
            )
            sys.stderr.flush()
            faulthandler.dump_traceback(all_threads=True)
