"""A search index, built once from vectors and read in place.

<index>/index.json           what the files are (`IndexDescription`); written last
        vectors/             the folder of vectors (launcher/embedding/vectors_folder.py), as hard links where
                             the file system has them: re-scoring reads its candidates there
        global-00000.faiss   the items' global vectors, part by part (launcher/searching/faiss_part.py)
        fine-00000.faiss     their fine vectors, where asked for

FAISS's reader is written in C++ and trusts its file. The hashes in index.json find damage, not malice: who
can change a file can change index.json. So open an index only if you would run a program of its builder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agff.contract import MAX_HASHED_BYTES
from agff.errors import DataError
from agff.files import changed_files, write_text
from launcher.embedding.vectors_folder import DESCRIPTION_FILE, VectorsFolder
from launcher.searching.faiss_part import KINDS, STORAGES, Kind, Storage

INDEX_FILE, VECTORS_FOLDER = "index.json", "vectors"
DESCRIPTION_NAME = f"{VECTORS_FOLDER}/{DESCRIPTION_FILE}"
FORMAT = 1
GLOBAL, FINE = "global", "fine"
_REMEDY = "build it again: python launcher/search.py INDEX --build VECTORS"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One FAISS file: the vectors of consecutive items."""

    file: str
    first_item: int
    num_items: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """The vectors of one sort of all items; the row of an item's j-th is num_vectors x item + j."""

    kind: Kind
    first_vector: int
    """Which of an item's M vectors are in it: 0 the global one, 1 the fine ones."""
    num_vectors: int
    """Of an item."""
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class IndexDescription:
    """Contents of index.json."""

    format: int = FORMAT
    storage: Storage
    weights_sha256: str
    """Of the model that made the vectors, as in vectors.json."""
    num_items: int
    groups: Mapping[str, Group]
    """By GLOBAL and FINE."""
    files: Mapping[str, str]
    """Size and SHA-256 of each FAISS file and of vectors.json."""


def part_file(group: str, number: int) -> str:
    """Name of a group's `number`-th file."""
    return f"{group}-{number:05d}.faiss"


def write_description(folder: Path, description: IndexDescription) -> None:
    """Write index.json, the last file of the folder."""
    write_text(folder / INDEX_FILE, json.dumps(asdict(description), indent=1) + "\n")


def open_folder(folder: Path, *, check_hashes: bool) -> tuple[IndexDescription, VectorsFolder]:
    """What the index is, its files compared with what was written; no FAISS file is opened.

    Of a file of more than 64 MiB the size alone is compared, unless it is a graph, whose links are followed
    unchecked. check_hashes: the SHA-256 of all. Raises DataError for an index that is absent, not complete,
    of another format, cut or changed.
    """
    description = _read_description(folder)
    followed = {
        part.file for group in description.groups.values() if group.kind == "hnsw" for part in group.parts
    }
    most = None if check_hashes else MAX_HASHED_BYTES
    problems = []
    for most_bytes, names in ((None, followed), (most, description.files.keys() - followed)):
        files = {name: description.files[name] for name in sorted(names)}
        problems += _changed(folder, files, most_bytes)
    _refuse(folder, problems)
    vectors = VectorsFolder(folder / VECTORS_FOLDER)
    _refuse(folder, _changed(vectors.folder, vectors.description.files, most))
    found = (vectors.description.weights_sha256, len(vectors), vectors.description.num_vectors)
    num_vectors = 1 + (description.groups[FINE].num_vectors if FINE in description.groups else found[2] - 1)
    if found != (description.weights_sha256, description.num_items, num_vectors):
        raise DataError(f"{folder}: its vectors are not those that the index was built from; {_REMEDY}")
    return description, vectors


def _changed(folder: Path, files: Mapping[str, str], max_hashed_bytes: int | None) -> list[str]:
    return changed_files(folder, files, max_hashed_bytes=max_hashed_bytes, shows_progress=True)


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    """Raise DataError if there are any."""
    if problems:
        raise DataError("\n".join([*problems, f"{folder}: not as it was written; {_REMEDY}"]))


def _read_description(folder: Path) -> IndexDescription:
    path = folder / INDEX_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]
        if type(found) is int and found > FORMAT:
            raise DataError(
                f"{path}: format {found} is newer than {FORMAT}, which this version reads; update "
                "agff-embed, or use the version that wrote it"
            )
        if found != FORMAT:
            raise ValueError(f"`format` must be {FORMAT}")
        groups = {name: _group(group) for name, group in values.pop("groups").items()}
        description = IndexDescription(**values, groups=groups)
        _check(description)
    except FileNotFoundError:
        what = f"no index here ({INDEX_FILE} is missing)" if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder}: {what}; make one of vectors: python launcher/search.py {folder} --build VECTORS"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; {_REMEDY}") from None
    return description


def _group(values: Mapping[str, Any]) -> Group:
    return Group(**{**values, "parts": tuple(Part(**part) for part in values["parts"])})


def _check(description: IndexDescription) -> None:
    """Raise ValueError or TypeError for values that no builder writes."""
    if description.storage not in STORAGES or not description.groups.keys() <= {GLOBAL, FINE}:
        raise ValueError(f"storage {description.storage}, groups {', '.join(description.groups)}")
    if GLOBAL not in description.groups:
        raise ValueError("it has no global vectors")
    _check_count("num_items", description.num_items)
    for name, group in description.groups.items():
        _check_count(f"{name}: num_vectors", group.num_vectors)
        if group.kind not in KINDS or group.first_vector != (0 if name == GLOBAL else 1):
            raise ValueError(f"{name}: kind {group.kind}, vectors from {group.first_vector}")
        end = 0
        for number, part in enumerate(group.parts):
            _check_count(f"{name}: part {number}: num_items", part.num_items)
            if part.file != part_file(name, number) or part.first_item != end:
                raise ValueError(f"{name}: part {number} is {part.file}, from item {part.first_item}")
            end += part.num_items
        if end != description.num_items:
            raise ValueError(f"{name}: {end} items of {description.num_items}")
    written = {part.file for group in description.groups.values() for part in group.parts}
    if description.files.keys() != written | {DESCRIPTION_NAME}:
        raise ValueError(f"files {', '.join(map(repr, description.files))}")
    if not all(isinstance(fingerprint, str) for fingerprint in description.files.values()):
        raise ValueError("the fingerprints of its files must be texts")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, found {value!r}")
