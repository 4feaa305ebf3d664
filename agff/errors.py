"""The errors a person sees: each says what, found, rule and remedy. Entry points exit with code 2 on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")

MOST_LISTED = 50
"""Findings that one error lists; the rest are counted."""


class AgffError(Exception):
    """Something the person can fix; its text is printed alone, without a traceback."""

    on_all_ranks = False
    """True when every rank raises the same error, so that one of them says it for all."""

    def shared(self) -> Self:
        """This error, raised by all ranks together."""
        self.on_all_ranks = True
        return self


class ConfigError(AgffError):
    """The configuration cannot run: an unknown, contradictory or out-of-range setting."""


class DataError(AgffError):
    """A data set, shard or sample is not what it must be; the text starts with its address."""


class StorageError(AgffError):
    """Bytes cannot be read now: network, disk, permission. The run stops; no other sample is drawn."""


class TrainingError(AgffError):
    """Training cannot go on: the gradients stay not finite, or the memory is too small."""


class CheckpointError(AgffError):
    """A run folder, checkpoint or release is missing, half written or belongs to something else."""


def all_or_errors(make: Callable[[Value], Result], values: Iterable[Value]) -> list[Result]:
    """`make(value)` of each value. Raises one DataError, with a line for each value whose `make` raised."""
    results, problems = [], []
    for value in values:
        try:
            results.append(make(value))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return results


def listed(what: str, findings: Sequence[str], *, see_all: str | None = None) -> str:
    """Text of an error with several findings of one kind: `what`, then each finding on a line of its own.

    A single finding is the whole text. see_all: the command that lists more than MOST_LISTED of them; without
    one all are here.
    """
    if len(findings) == 1:
        return findings[0]
    most = len(findings) if see_all is None else MOST_LISTED
    lines = [f"{what}:", *findings[:most]]
    if len(findings) > most:
        lines.append(f"and {len(findings) - most} more; {see_all} lists all")
    return "\n  ".join(lines)
