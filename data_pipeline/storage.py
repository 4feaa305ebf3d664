"""Where shard files come from: a local folder here, a remote one in data_pipeline/remote.py."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SAFE_NAME = r"\w[\w.+-]*"
"""Of sources and files, which become parts of paths."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """What the manifest says of a file."""

    name: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """A manifest may come from anywhere: names and hashes become paths. Raises ValueError."""
        if not re.fullmatch(SAFE_NAME, self.name):
            raise ValueError(f"{self.name!r} is no file name: letters, digits, and . _ + - inside")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{self.sha256!r} is no SHA-256 of {self.name}")
        if type(self.size_bytes) is not int or self.size_bytes < 0:
            raise ValueError(f"{self.size_bytes!r} is no size of {self.name}")


class Folder(Protocol):
    """A folder of shards, wherever it is."""

    location: str

    def read_bytes(self, name: str) -> bytes:
        """A small file at the top, as it is now. Raises FileNotFoundError or another OSError."""

    def local_path(self, source: str, file: StoredFile) -> Path:
        """Path of the file on this machine, fetched if it must be. Raises StorageError."""

    def open(self, source: str, file: StoredFile) -> int:
        """File descriptor, on a local disk readable without its name. Raises OSError or StorageError."""

    def fetch_ahead(self, source: str, file: StoredFile) -> None:
        """Say that the file will be wanted soon; returns at once."""


class LocalFolder:
    """A folder of this machine, or of a file system that it mounts."""

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)

    def read_bytes(self, name: str) -> bytes:
        """See Folder."""
        return (self.path / name).read_bytes()

    def local_path(self, source: str, file: StoredFile) -> Path:
        """See Folder."""
        return self.path / source / file.name

    def open(self, source: str, file: StoredFile) -> int:
        """See Folder."""
        return os.open(self.local_path(source, file), os.O_RDONLY)

    def fetch_ahead(self, source: str, file: StoredFile) -> None:
        """See Folder; nothing to do."""
