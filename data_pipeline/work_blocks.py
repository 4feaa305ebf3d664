"""A work that is cut into blocks, done by any number of processes and continued after a kill.

What is done lies in `<folder>/.blocks` until all is, a file a block: a note as one line of JSON, then bytes.
A block is always the same part of the work, whoever does it, so the result depends neither on the number of
processes nor on how often the work was interrupted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from agff.errors import ConfigError, DataError
from agff.files import partial_path, publish, write_text

BLOCKS_FOLDER = ".blocks"


class WorkBlocks:
    """The blocks in a folder, by name, and the settings of the work they are parts of."""

    def __init__(self, folder: Path, *, settings_file: str) -> None:
        """settings_file: name of the file of settings, in the folder when the work is done (then with more in
        it), in `.blocks` before."""
        self.folder, self._blocks = folder, folder / BLOCKS_FOLDER
        self._done, self._begun = folder / settings_file, self._blocks / settings_file

    @property
    def is_finished(self) -> bool:
        """Whether the settings are in the folder itself, and with them everything."""
        return self._done.exists()

    @property
    def is_begun(self) -> bool:
        """Whether the work was begun here, or is done."""
        return self._done.exists() or self._begun.exists()

    def begin(
        self,
        settings: Mapping[str, Any],
        *,
        what: str,
        same_part: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        """Make `.blocks`, unless the work is done.

        what: "vectors". same_part: of the values of a settings file, those to compare. Raises ConfigError
        when the folder holds the same with other settings, OSError when it cannot be written.
        """
        if path := next((path for path in (self._done, self._begun) if path.exists()), None):
            try:
                found = same_part(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
                raise ConfigError(
                    f"{path} is damaged; remove {self.folder}, or choose another folder"
                ) from None
            if changed := [key for key in settings if found.get(key) != settings[key]]:
                raise ConfigError(
                    f"{self.folder} holds {what} with other {', '.join(changed)}; remove it, or choose "
                    "another folder"
                )
        if not self.is_finished:
            self._blocks.mkdir(parents=True, exist_ok=True)
            write_text(self._begun, json.dumps(settings))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the names that are not on disk; none when the work is done."""
        return [] if self.is_finished else [name for name in names if not (self._blocks / name).exists()]

    def write(self, name: str, note: Mapping[str, Any], content: bytes) -> None:
        """Put a block on disk. note: JSON values."""
        path = self._blocks / name
        partial = partial_path(path)
        partial.write_bytes(json.dumps(note).encode() + b"\n" + content)
        publish(partial, path)

    def note(self, name: str) -> dict[str, Any]:
        """Of a block. Raises DataError for one that is missing."""
        with self._open(name) as file:
            return dict(json.loads(file.readline()))

    def content(self, name: str) -> bytes:
        """Of a block. Raises DataError for one that is missing."""
        with self._open(name) as file:
            file.readline()
            return file.read()

    def _open(self, name: str) -> BinaryIO:
        try:
            return (self._blocks / name).open("rb")
        except FileNotFoundError:
            raise DataError(
                f"{self.folder}: block {name} is not written; give the same command again to continue"
            ) from None

    def finish(self, values: Mapping[str, Any]) -> None:
        """Write the settings file with all that is known at the end."""
        write_text(self._done, json.dumps(values, indent=1) + "\n")

    def clean_up(self) -> None:
        """Remove the blocks of a work that is done, and what killed processes left."""
        shutil.rmtree(self._blocks, ignore_errors=True)
        for left in self.folder.glob("*.partial"):
            left.unlink(missing_ok=True)
