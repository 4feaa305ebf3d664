"""One writer of a folder at a time, on one machine and on several that share the folder."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from agff.files import locked

log = logging.getLogger(__name__)
_BEAT_S = 5.0
"""The holder rewrites its claim this often."""
_SILENT_S = 30.0
"""A claim that has not changed for this long has lost its holder."""
_SETTLE_S = 2.0
"""Without locks, several may find a folder free at the same moment: who wrote last by then holds it."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Of a file system without locks, for example Lustre mounted without them."""
_CLAIM_BYTES = 256
"""Each beat overwrites the one before, so that no reader meets an empty claim."""


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the claim `path` until the block ends. While another process holds it, wait, and log a warning
    that names it.

    A lock decides, which ends with its process. Machines that do not see each other's locks watch the claim
    itself: its holder changes it every few seconds. The file stays, empty, unless somebody removes it because
    what it protects is complete. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        has_locks = _lock(stack, path)
        holder = (
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        is_held = False
        while not is_held:
            found = _read(path)
            if found and not (has_locks and f" on {socket.gethostname()}," in found):
                _wait_for_silence(path, found)
            _write(path, f"{holder}\n0")
            is_held = has_locks or _is_still(path, holder)
        is_over = threading.Event()
        beats = threading.Thread(target=_beat, args=(path, holder, is_over), daemon=True)
        beats.start()
        try:
            yield
        finally:
            is_over.set()
            beats.join()
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, 0)


def _lock(stack: contextlib.ExitStack, path: Path) -> bool:
    """False where the file system has no locks."""
    try:
        if not stack.enter_context(locked(path, wait=False)):
            _warn(path, _read(path))
            stack.enter_context(locked(path))
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        path.touch()
        return False


def _wait_for_silence(path: Path, found: str) -> None:
    _warn(path, found)
    changed_at = time.monotonic()
    while found and time.monotonic() - changed_at < _SILENT_S:
        time.sleep(_BEAT_S / 5)
        if (now := _read(path)) != found:
            found, changed_at = now, time.monotonic()


def _is_still(path: Path, holder: str) -> bool:
    """False when another process claims the folder too. A file that is gone protects nothing any more."""
    time.sleep(_SETTLE_S)
    return not path.exists() or _read(path).startswith(holder)


def _warn(path: Path, found: str) -> None:
    holder = found.partition("\n")[0] or "another process"
    log.warning(
        "%s is being written by %s; waiting until it ends (at most %d s more if it was killed)",
        path.parent,
        holder,
        _SILENT_S,
    )


def _beat(path: Path, holder: str, is_over: threading.Event) -> None:
    for beat in itertools.count(1):
        if is_over.wait(_BEAT_S):
            return
        with contextlib.suppress(OSError):
            _write(path, f"{holder}\n{beat}")


def _write(path: Path, text: str) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        file.write(text.encode().ljust(_CLAIM_BYTES - 1)[: _CLAIM_BYTES - 1] + b"\n")


def _read(path: Path) -> str:
    """The claim, "" without a holder. Network file systems look at a file again when it is opened."""
    try:
        return path.read_text(encoding="utf-8").rstrip()
    except FileNotFoundError:
        return ""
