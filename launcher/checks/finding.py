"""One finding of `doctor`, a line of its table, and how the text of errors and programs becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    state: State
    subject: str
    found: str
    """What is there and, where it is not well, the rule it breaks."""
    remedy: str = ""
    """What to type; every warning and error has one."""

    def __post_init__(self) -> None:
        if (self.state == "ok") == bool(self.remedy):
            raise ValueError(f"{self}: each warning and error has a remedy, and nothing else has")


def from_message(subject: str, message: str) -> Finding:
    """An error of ours, whose text ends with `; remedy`."""
    found, _, remedy = message.rpartition("; ")
    return Finding(
        "error", subject, one_line(found or remedy), one_line(remedy if found else "see README.md")
    )


def one_line(text: object) -> str:
    """Without line breaks and runs of blanks."""
    return " ".join(str(text).split())


def last_lines(text: str, count: int) -> str:
    """The last lines of a program's output that say something, without a traceback's underlines."""
    lines = [one_line(line) for line in text.splitlines() if line.strip(" ^~")]
    return " | ".join(lines[-count:])
