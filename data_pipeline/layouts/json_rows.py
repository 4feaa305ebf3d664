"""Rows of a large JSON file, a list of objects or one object a line, without holding the file."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agff.errors import DataError
from agff.files import hashing_bar

_READ_BYTES = 2**22
_INDEXED = 256
"""Rows between two whose places are kept."""
_BETWEEN = re.compile(r"[\s,]*")
_BEFORE = re.compile(r"\ufeff?\s*\[?[\s,]*")
MAX_OBJECT_CHARACTERS = 64 * 2**20
"""Of one object: what is read of it is held. An image is named by its path and is not in the text."""
_LONGEST_TOKEN = 32
"""An error nearer to the end of what was read may be that of an object that was read in part."""


def read_json(path: Path) -> Any:
    """The value of a JSON file that is held as a whole. Raises DataError, also for a key that is there twice:
    which one counts cannot be known."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_key_once)
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise DataError(f"{path}: not JSON in UTF-8: {error}; fix it, or download it again") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


@dataclass(frozen=True, kw_only=True)
class JsonRows:
    """How many rows a file has, and where some of them begin."""

    path: Path
    num_rows: int
    places: tuple[int, ...]
    """Byte of every _INDEXED-th row."""

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows start .. stop - 1. Raises DataError."""
        if start >= min(stop, self.num_rows):
            return
        first = start // _INDEXED
        for number, (_, row) in enumerate(_objects(self.path, self.places[first]), start=first * _INDEXED):
            if number >= start:
                yield row
            if number + 1 == stop:
                return


def json_rows(path: Path) -> JsonRows:
    """Read a file once, with a progress bar when it takes long. Raises DataError, with the byte, for what is
    no list of objects."""
    return _json_rows(path, file_state(path))


def file_state(path: Path) -> tuple[int, int]:
    """(size, time of the last change), by which a file that was read before is known. Raises DataError."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)  # a writer reads many parts of a file
def _json_rows(path: Path, state: tuple[int, int]) -> JsonRows:
    places: list[int] = []
    count = 0
    with hashing_bar(f"read {path.name}", state[0], is_shown=True) as bar:
        for place, _ in _objects(path, 0):
            if count % _INDEXED == 0:
                bar.update(place - bar.n)
                places.append(place)
            count += 1
    return JsonRows(path=path, num_rows=count, places=tuple(places))


def _objects(path: Path, place: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(its first byte, object) of each object from that byte of the file on; byte 0 is before the list."""
    text = _Text(path, place)
    try:
        with path.open("rb") as file:
            file.seek(place)
            while True:
                text.read(file)
                while (value := text.next_object()) is not None:
                    yield value
                if text.is_done():
                    text.refuse_more(file)
                    return
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text is not UTF-8: {error.reason}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    except RecursionError:
        raise DataError(f"{path}: the object at byte {text.place:,} is nested too deeply") from None


class _Text:
    """What was read of a file and not used yet."""

    def __init__(self, path: Path, place: int) -> None:
        self.path, self.place = path, place
        """The byte of the next character."""
        self._text, self._at, self._is_end = "", 0, False
        self._between, self._needs_end = (_BEFORE, False) if place == 0 else (_BETWEEN, False)
        self._to_text = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder(object_pairs_hook=_each_key_once).raw_decode

    def read(self, file: IO[bytes]) -> None:
        """Add what comes next."""
        content = file.read(_READ_BYTES)
        self._is_end = not content
        self._text = self._text[self._at :] + self._to_text.decode(content, final=self._is_end)
        self._at = 0

    def next_object(self) -> tuple[int, dict[str, Any]] | None:
        """(its first byte, object), or None where the rest holds no whole one. Raises DataError."""
        if self._text:
            match = self._between.match(self._text, self._at)
            assert match is not None, "it matches the empty text"
            if self._between is _BEFORE:
                self._between, self._needs_end = _BETWEEN, "[" in match[0]
            self._go_to(match.end())
        if self._text[self._at : self._at + 1] != "{":
            return None
        try:
            value, end = self._decode(self._text, self._at)
        except json.JSONDecodeError as error:
            may_go_on = error.msg.startswith("Unterminated string") or (
                error.pos > len(self._text) - _LONGEST_TOKEN
            )
            if may_go_on and not self._is_end:
                self._refuse_too_long()
                return None
            what = f"damaged or cut short behind byte {self.place:,}: {error.msg}"
            raise DataError(f"{self.path}: {what}; download it again") from None
        except ValueError as error:  # a number of more digits than Python reads, a key twice
            raise DataError(f"{self.path}: the object at byte {self.place:,}: {error}") from None
        place = self.place
        self._go_to(end)
        return place, value

    def is_done(self) -> bool:
        """Whether the list has ended. Raises DataError for anything else than an object in it, and for a list
        that does not end."""
        rest = self._text[self._at : self._at + 20]
        if rest and not rest.startswith(("{", "]")):
            raise DataError(f"{self.path}: byte {self.place:,}: {rest!r} where an object must begin")
        if self._is_end and self._needs_end and not rest:
            raise DataError(f"{self.path}: cut short at byte {self.place:,}; download it again")
        return rest.startswith("]") or self._is_end

    def refuse_more(self, file: IO[bytes]) -> None:
        """Raise DataError for anything behind the end of the list: a second list would be lost."""
        rest = self._text[self._at + 1 :].encode()
        while rest or (rest := file.read(_READ_BYTES)):
            if rest.strip():
                raise DataError(
                    f"{self.path}: the list ends at byte {self.place:,} and {rest.strip()[:20]!r} follows; a "
                    "file holds one list, or one object a line"
                )
            rest = b""

    def _refuse_too_long(self) -> None:
        """Raise DataError for an object that goes on and on."""
        if len(self._text) - self._at > MAX_OBJECT_CHARACTERS:
            raise DataError(
                f"{self.path}: the object at byte {self.place:,} is longer than {MAX_OBJECT_CHARACTERS:,} "
                "characters, the limit of one object; a table of one object a row is expected, and images by "
                "their paths"
            )

    def _go_to(self, at: int) -> None:
        self.place, self._at = self.place + len(self._text[self._at : at].encode()), at
