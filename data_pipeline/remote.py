"""Remote shards through fsspec and a local cache.

The cache is shared by all processes of a machine. Its files are named by their SHA-256, so equal files of any
run are one; each was checked before it got its name. A lock of the file system keeps two processes from
fetching the same file.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agff.errors import AgffError, ConfigError, StorageError
from agff.files import locked, publish, sha256_of
from data_pipeline.retries import DamagedError, with_retries
from data_pipeline.storage import LocalFolder, StoredFile

log = logging.getLogger(__name__)
SCHEMES = ("s3", "gs", "gcs", "hf", "http", "https", "memory")
"""Storages that are read through fsspec; any other URL is refused, above all `pipe:`."""
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
HTTP_TIMEOUT_S = 60
"""An HTTP server that sends nothing for longer than this has failed this attempt."""
FETCHERS = 4
"""Files that one process fetches ahead at the same time."""
IN_USE_S = 60
"""A cached file that was opened so recently makes no room for one that is fetched ahead."""
NOT_USED_YET = 0
"""Access time of a file that was fetched ahead and not opened since."""
WAITING_S = 3600
"""After which such a file is taken for one that nobody will open any more."""
LOCK_WAIT_S = 0.1
"""Before a file that another process may be fetching is looked at again."""
ROOM_WAIT_S = 0.1
"""Between two looks for room in a cache that is full of what is being fetched."""
_CACHED_NAME = re.compile(r"[0-9a-f]{64}(\.[\w+-]*)?")
_PARTIAL_NAME = re.compile(r"[0-9a-f]{64}\.\d+\.partial")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Local copies of remote shards; not used for a local folder."""

    dir: str = "~/.cache/agff/shards"
    """Folder on a disk of this machine, shared by the ranks of one user."""
    max_gib: float = 100.0
    """Bound on its size; the files used longest ago make room."""
    fetch_ahead_steps: int = 32
    """Shards are fetched this many steps before they are read."""

    def __post_init__(self) -> None:
        if not 0 < self.max_gib < math.inf:
            raise ConfigError(f"data.cache.max_gib={self.max_gib} must be > 0 and finite")
        if self.fetch_ahead_steps < 0:
            raise ConfigError(f"data.cache.fetch_ahead_steps={self.fetch_ahead_steps} must be >= 0")

    @property
    def max_bytes(self) -> int:
        """The bound in bytes."""
        return int(self.max_gib * 2**30)


def open_folder(location: str, cache: CacheConfig) -> LocalFolder | CachedFolder:
    """The folder at a path or URL. Raises ConfigError for other storages: no data path runs a command."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?", location)
    is_url = scheme is not None and scheme[1] in SCHEMES and scheme[2]
    is_file = location.startswith("file:///")
    if "::" in location or (scheme and not is_url and not is_file):
        raise ConfigError(
            f"data.shards={location!r}: {scheme[0] if scheme else '::'!r} is no storage we read; "
            f"give a path, or a URL with {', '.join(f'{name}://' for name in SCHEMES)}. Commands (pipe:) are "
            "never run"
        )
    if not is_url:
        return LocalFolder(Path(location.removeprefix("file://")))
    return CachedFolder(location.rstrip("/"), cache)


class CachedFolder:
    """A remote folder whose files are fetched into the cache when they are wanted, or ahead of it."""

    def __init__(self, url: str, cache: CacheConfig) -> None:
        self.location = url
        self._cache = cache
        self._dir = Path(cache.dir).expanduser()
        self._wanted: tuple[int, queue.SimpleQueue[tuple[str, StoredFile]]] | None = None
        self._pending: set[str] = set()
        """Hashes of what was announced and neither fetched nor read since."""

    def read_bytes(self, name: str) -> bytes:
        """See Folder. Not cached: the manifest decides what the rest means."""
        url = f"{self.location}/{name}"
        return with_retries(url, lambda: self._filesystem().cat_file(url))

    def local_path(self, source: str, file: StoredFile) -> Path:
        """See Folder."""
        os.close(self.open(source, file))
        return self._path(file)

    def open(self, source: str, file: StoredFile) -> int:
        """See Folder."""
        self._pending.discard(file.sha256)
        while True:
            with contextlib.suppress(FileNotFoundError):  # not fetched yet, or evicted by another process
                descriptor = os.open(self._path(file), os.O_RDONLY)
                if os.fstat(descriptor).st_size != file.size_bytes:  # a disk lost its end
                    os.close(descriptor)
                    self._path(file).unlink(missing_ok=True)
                    continue
                with contextlib.suppress(PermissionError):  # somebody else's copy
                    os.utime(descriptor)  # what was used longest ago goes first
                return descriptor
            self._fetch(source, file, is_ahead=False)

    def fetch_ahead(self, source: str, file: StoredFile) -> None:
        """See Folder."""
        if self._wanted is None or self._wanted[0] != os.getpid():  # threads do not survive a fork
            self._wanted = os.getpid(), queue.SimpleQueue()
            self._pending.clear()
            for _ in range(FETCHERS):
                threading.Thread(target=self._fetch_wanted, args=(self._wanted[1],), daemon=True).start()
        if file.sha256 not in self._pending and not self._path(file).exists():
            self._pending.add(file.sha256)
            self._wanted[1].put((source, file))

    def _fetch_wanted(self, wanted: queue.SimpleQueue[tuple[str, StoredFile]]) -> None:
        while True:
            source, file = wanted.get()
            is_settled = True
            if file.sha256 in self._pending:
                with contextlib.suppress(AgffError):  # whoever needs the file will meet the error
                    is_settled = self._fetch(source, file, is_ahead=True)
            if is_settled:
                self._pending.discard(file.sha256)
            else:  # the ranks of a machine want the same files in the same order: take the next one
                time.sleep(LOCK_WAIT_S)
                wanted.put((source, file))

    def _path(self, file: StoredFile) -> Path:
        return self._dir / f"{file.sha256}{Path(file.name).suffix}"

    def _filesystem(self) -> Any:
        import fsspec

        scheme = self.location.partition(":")[0]
        options: dict[str, Any] = {}
        try:
            if scheme in ("http", "https"):
                import aiohttp

                timeout = aiohttp.ClientTimeout(
                    total=None, sock_connect=HTTP_TIMEOUT_S, sock_read=HTTP_TIMEOUT_S
                )
                options = {"client_kwargs": {"timeout": timeout}}
            return fsspec.filesystem(scheme, **options)
        except ImportError as error:
            raise ConfigError(
                f"{scheme}:// needs the package {PACKAGES[scheme]} ({error}); pip install {PACKAGES[scheme]}"
            ) from None

    def _fetch(self, source: str, file: StoredFile, *, is_ahead: bool) -> bool:
        """Fetch the file unless it is there, one process at a time. Raises StorageError when it cannot.

        False when it is fetched ahead and its lock is taken: another process may be fetching it.
        """
        url = f"{self.location}/{source}/{file.name}"
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            with locked(self._lock_path(file.sha256), wait=not is_ahead) as is_ours:
                if not is_ours:
                    return False
                if self._path(file).exists() or (is_ahead and file.sha256 not in self._pending):
                    return True
                partial = self._make_room(file, url, is_ahead=is_ahead)
                if partial is None:
                    return True
                try:
                    with_retries(url, lambda: self._download(url, file, partial, is_ahead=is_ahead))
                finally:
                    partial.unlink(missing_ok=True)
                return True
        except OSError as error:
            raise StorageError(
                f"{url}: cannot write {file.size_bytes:,} bytes to the cache {self._dir}: {error}; "
                "free space there, lower data.cache.max_gib, or choose another data.cache.dir"
            ) from None

    def _download(self, url: str, file: StoredFile, partial: Path, *, is_ahead: bool) -> None:
        try:
            self._filesystem().get_file(url, str(partial))
        except FileNotFoundError:
            raise StorageError(f"{url}: the file is missing there, the manifest names it") from None
        if (size := partial.stat().st_size) != file.size_bytes:
            raise DamagedError(f"{size:,} bytes came, the manifest says {file.size_bytes:,}")
        digest = sha256_of(partial)
        if digest != file.sha256:
            raise DamagedError(
                f"SHA-256 of what came is {digest[:12]}..., the manifest says {file.sha256[:12]}..."
            )
        if is_ahead:
            os.utime(partial, (NOT_USED_YET, time.time()))
        publish(partial, self._path(file))

    def _make_room(self, file: StoredFile, url: str, *, is_ahead: bool) -> Path | None:
        """Evict until the file fits, and claim its space by the name of an empty file, which is returned.

        None when a file that is fetched ahead would drive out what is in use or was itself fetched ahead.
        """
        if file.size_bytes > self._cache.max_bytes:
            raise StorageError(
                f"{url}: {file.size_bytes:,} bytes are more than the whole cache of "
                f"{self._cache.max_bytes:,} (data.cache.max_gib); raise it"
            )
        partial = self._dir / f"{file.sha256}.{file.size_bytes}.partial"
        while not self._claim_room(file, partial, is_ahead=is_ahead):
            if is_ahead:
                return None
            time.sleep(ROOM_WAIT_S)
        return partial

    def _claim_room(self, file: StoredFile, partial: Path, *, is_ahead: bool) -> bool:
        """False when there is no room now."""
        with locked(self._dir / "lock"):
            used, now = 0, time.time()
            evictable = []
            for path in self._dir.iterdir():
                if _PARTIAL_NAME.fullmatch(path.name):
                    used += self._claimed(path, held=self._lock_path(file.sha256))
                elif _CACHED_NAME.fullmatch(path.name):  # whatever else lies there is not ours
                    status = path.stat()
                    used += status.st_size
                    is_waiting = status.st_atime == NOT_USED_YET and now - status.st_mtime < WAITING_S
                    if not is_ahead or not (is_waiting or now - status.st_mtime < IN_USE_S):
                        evictable.append((is_waiting, status.st_mtime, status.st_size, path))
            for _, _, size, path in sorted(evictable):
                if used + file.size_bytes <= self._cache.max_bytes:
                    break
                path.unlink()
                used -= size
            if used + file.size_bytes > self._cache.max_bytes:
                return False
            partial.touch()
            return True

    def _claimed(self, partial: Path, *, held: Path) -> int:
        """Bytes that a running fetch will need; one whose process was killed is removed and needs none.

        held: the lock that the caller has; who else needs it cannot be running.
        """
        sha256, size, _ = partial.name.split(".")
        lock = self._lock_path(sha256)
        with contextlib.nullcontext(True) if lock == held else locked(lock, wait=False) as is_dead:
            if is_dead:
                partial.unlink(missing_ok=True)
                return 0
        return int(size)

    def _lock_path(self, sha256: str) -> Path:
        return self._dir / f"lock-{sha256[:2]}"
