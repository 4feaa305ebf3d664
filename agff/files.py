"""Files that others see whole or not at all: locks, names given last, hashes; and their progress bar."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

SILENT_S = 5
"""A progress bar appears when the work takes longer."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file among the processes and threads of this machine; False when `wait` is and it is
    taken. The holder may remove the file: who waited locks the next one of that name."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if _is_at(descriptor, path):
                yield True
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
    try:
        partial.write_text(text, encoding="utf-8")
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class _CountedFile(io.FileIO):
    """Calls `progress` with the number of bytes of each block that is read."""

    def __init__(self, path: Path, progress: Callable[[int], object]) -> None:
        super().__init__(path)
        self._progress = progress

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self._progress(count)
        return count


def sha256_of(path: Path, *, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits. Raises OSError.

    progress: called with the number of bytes of each block.
    """
    with _CountedFile(path, progress) if progress else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: Path, *, progress: Callable[[int], object] | None = None) -> str:
    """Size and SHA-256 of a file, as checkpoints and releases record them. Raises OSError."""
    return f"{path.stat().st_size} bytes, sha256 {sha256_of(path, progress=progress)}"


def changed_files(
    folder: Path,
    written: Mapping[str, str],
    *,
    max_hashed_bytes: int | None = None,
    shows_progress: bool = False,
) -> list[str]:
    """One line for each file that is absent or not as it was written.

    written: name -> `file_fingerprint`. Of files larger than `max_hashed_bytes` (None: of none) the size
    alone is compared. shows_progress: with a progress bar when it takes long. Names that lead out of the
    folder are refused, and nothing is read.
    """
    problems = [
        f"{folder}: {name!r} is not the name of a file in it"
        for name in written
        if Path(name).is_absolute() or ".." in Path(name).parts
    ]
    if problems:
        return problems
    total_bytes = sum((folder / name).stat().st_size for name in written if (folder / name).is_file())
    with hashing_bar(f"check {folder.name}", total_bytes, is_shown=shows_progress) as bar:
        for name, expected in written.items():
            path = folder / name
            try:
                size = path.stat().st_size
                only_size = max_hashed_bytes is not None and size > max_hashed_bytes
                found = f"{size} bytes" if only_size else file_fingerprint(path, progress=bar.update)
            except OSError as error:
                problems.append(f"{path}: cannot read it: {error.strerror}")
                continue
            if found != (expected.partition(",")[0] if only_size else expected):
                problems.append(f"{path}: found {found}, written were {expected}")
    return problems


def hashing_bar(what: str, total_bytes: int, *, is_shown: bool) -> tqdm[NoReturn]:
    """Progress bar whose `update` is `sha256_of`'s `progress`; it appears when the work takes longer than
    SILENT_S."""
    return tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        delay=SILENT_S,
        disable=not is_shown,
        dynamic_ncols=True,
    )
