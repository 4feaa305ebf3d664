"""Files that others see whole or not at all: locks, names given last, hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file among the processes and threads of this machine; False when `wait` is and it is
    taken."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Where this process writes what will be `path`: two writers of the same file do not meet."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, path: Path) -> None:
    """Give a written file its name when it is on disk: a kill or a power cut leaves the old file or the whole
    new one."""
    sync(partial)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, in one piece: a kill leaves the old file or the whole new one."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
