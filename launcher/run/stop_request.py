"""Being asked to stop: SIGUSR1 (Slurm's warning before the time limit or a preemption) and SIGTERM."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_CODE = 75
"""Stopped on request, all is saved, the same command continues: EX_TEMPFAIL ("try again") of sysexits.h."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """True in a condition once this process was asked to stop."""

    def __init__(self) -> None:
        self._name: str | None = None

    def listen(self) -> None:
        """From now on the signals are requests; they no longer end the process."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """The signals do nothing from now on: all is saved, and none may change Python's exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self._name is not None
