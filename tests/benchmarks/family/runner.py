"""Runs tasks one after the other, and those that are done only once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.family.tasks import Task

Run = Callable[[Task, Path], int]
"""(task, file to which its output is added) -> exit code."""


def source_digest(folders: Iterable[Path]) -> str:
    """SHA-256 of every source file: other code gives other results."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.as_posix()} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(kw_only=True)
class State:
    """What was begun and what is done, by the fingerprints of the tasks."""

    begun: dict[str, str] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> State:
        """Empty where there is none."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def fingerprints(tasks: Sequence[Task], code: str) -> dict[str, str]:
    """Of each task: its command, the code and the tasks it reads, theirs included."""
    found: dict[str, str] = {}
    for task in tasks:
        parts: list[Any] = [code, task.command, [found[name] for name in task.after]]
        found[task.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return found


def run_tasks(tasks: Sequence[Task], folder: Path, *, code: str, run: Run) -> Mapping[str, float]:
    """Seconds of each task. One that was done with the same command, code and inputs is left out; one that
    was interrupted is given its own output to continue; what others wrote in its place is removed first.

    Raises RuntimeError when a command fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "state.json", folder / "log.txt"
    state, wanted = State.read(path), fingerprints(tasks, code)
    for task in tasks:
        fingerprint = wanted[task.name]
        if state.done.get(task.name) == fingerprint and task.output and task.output.exists():
            continue
        if state.begun.get(task.name) != fingerprint or not task.resumes:
            _remove(task.output)
            state.seconds.pop(task.name, None)
        state.begun[task.name] = fingerprint
        state.done.pop(task.name, None)
        state.write(path)
        sys.stderr.write(f"== {task.name}\n")
        start = time.monotonic()
        code_of_exit = run(task, log)
        earlier = state.seconds.get(task.name, 0.0)  # of an interrupted start
        state.seconds[task.name] = round(earlier + time.monotonic() - start, 1)
        if code_of_exit == 0:
            state.done[task.name] = fingerprint
        state.write(path)
        if code_of_exit:
            raise RuntimeError(
                f"{task.name}: exit code {code_of_exit} of `{' '.join(task.command)}`{_last_error(log)}; its "
                f"output is at the end of {log}, and the same command continues here"
            )
    return {task.name: state.seconds[task.name] for task in tasks}


def run_command(task: Task, log: Path) -> int:
    """The real one: a process in the working folder."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(task.command)}\n")
        file.flush()
        return subprocess.run(task.command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def _last_error(log: Path) -> str:
    """What our commands say at the end of the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:] if log.exists() else []
    return next((f": {line}" for line in reversed(lines) if line.startswith("error: ")), "")


def _remove(output: Path | None) -> None:
    if output is None:
        return
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)
