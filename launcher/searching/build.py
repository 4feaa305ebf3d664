"""A folder of vectors -> a search index, written beside its name and given it at the end."""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agff.errors import ConfigError
from agff.files import file_fingerprint, locked, partial_path, sync
from launcher.embedding.vectors_folder import DESCRIPTION_FILE, VectorsFolder
from launcher.searching.faiss_part import (
    PART_BYTES,
    Kind,
    Storage,
    faiss,
    faiss_path,
    kind_for,
    num_training_rows,
    row_bytes,
    write_part,
)
from launcher.searching.index_folder import (
    DESCRIPTION_NAME,
    FINE,
    GLOBAL,
    VECTORS_FOLDER,
    Group,
    IndexDescription,
    Part,
    part_file,
    write_description,
)
from launcher.searching.vector_blocks import blocks_of, vectors_of


@dataclass(frozen=True, kw_only=True)
class IndexChoice:
    """What to build."""

    kind: Kind | None = None
    """None: by size (`kind_for`)."""
    storage: Storage = "float32"
    with_fine: bool = False
    """The fine vectors too, num_vectors - 1 times as many as the global ones."""
    part_bytes: int = PART_BYTES


def build_index(
    vectors_folder: Path, out: Path, choice: IndexChoice, *, progress: Callable[[int], object]
) -> IndexDescription:
    """Write the index. Either all of OUT is there at the end, or nothing is.

    progress: called with the number of vectors that were added. Raises ConfigError when OUT exists, is being
    written by another process or cannot be written, or the vectors have no fine ones; DataError for vectors
    that are damaged or not finite.
    """
    faiss()  # before anything is read
    faiss_path(out)
    try:
        _check_absent(out)  # also "." and "/", which have no name
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.lock")
        with locked(lock, wait=False) as is_ours:
            if not is_ours:
                raise ConfigError(f"{out}: another process is writing it; wait for it, or choose another")
            try:
                return _build_locked(vectors_folder, out, choice, progress)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written: {error.strerror or error}; choose another folder or make room"
        ) from None


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already; choose another folder or remove it")


def _build_locked(
    vectors_folder: Path, out: Path, choice: IndexChoice, progress: Callable[[int], object]
) -> IndexDescription:
    """`build_index`, by the one process that may."""
    _check_absent(out)  # another process may have written it meanwhile
    vectors = VectorsFolder(vectors_folder, check_hashes=True)
    if choice.with_fine and vectors.description.num_vectors == 1:
        raise ConfigError(f"{vectors_folder}: its items have no fine vectors; leave --fine out")
    killed = f"{glob.escape(f'{out.name}.{socket.gethostname()}-')}*.partial"
    for left in out.parent.glob(killed):
        shutil.rmtree(left, ignore_errors=True)
    folder = partial_path(out)
    try:
        folder.mkdir()
        _link(vectors.folder, folder / VECTORS_FOLDER, [*vectors.description.files, DESCRIPTION_FILE])
        groups = {GLOBAL: _write_group(vectors, folder, GLOBAL, choice, progress)}
        if choice.with_fine:
            groups[FINE] = _write_group(vectors, folder, FINE, choice, progress)
        names = [part.file for group in groups.values() for part in group.parts]
        names.append(DESCRIPTION_NAME)
        for name in names:
            sync(folder / name)
        description = IndexDescription(
            storage=choice.storage,
            weights_sha256=vectors.description.weights_sha256,
            num_items=len(vectors),
            groups=groups,
            files={name: file_fingerprint(folder / name) for name in names},
        )
        write_description(folder, description)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return description


def _link(source: Path, folder: Path, names: list[str]) -> None:
    """The files by a second name, which costs no space; copies where the file system has no such names."""
    folder.mkdir()
    for name in names:
        try:
            os.link((source / name).resolve(), folder / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)
            sync(folder / name)


def _write_group(
    vectors: VectorsFolder, folder: Path, name: str, choice: IndexChoice, progress: Callable[[int], object]
) -> Group:
    num_items, (num_vectors, dim) = len(vectors), vectors.vectors.shape[1:]
    which = slice(0, 1) if name == GLOBAL else slice(1, num_vectors)
    per_item = which.stop - which.start
    kind = choice.kind or kind_for(num_items * per_item, dim, choice.storage)
    size = max(1, choice.part_bytes // (per_item * row_bytes(dim, choice.storage)))
    parts: list[Part] = []
    for first in range(0, num_items, size):
        part = Part(
            file=part_file(name, len(parts)), first_item=first, num_items=min(size, num_items - first)
        )
        num_rows = part.num_items * per_item
        num_training = -(-num_training_rows(kind, choice.storage, num_rows) // per_item)
        write_part(
            folder / part.file,
            _blocks(vectors, part, which, progress),
            kind=kind,
            storage=choice.storage,
            num_rows=num_rows,
            training_ND=_flat(vectors_of(vectors, _spread(part, num_training), which=which)),
        )
        parts.append(part)
    return Group(kind=kind, first_vector=which.start, num_vectors=per_item, parts=tuple(parts))


def _blocks(
    vectors: VectorsFolder, part: Part, which: slice, progress: Callable[[int], object]
) -> Iterator[NDArray[np.float32]]:
    """(n, D) of the part's items in turn."""
    items = range(part.first_item, part.first_item + part.num_items)
    for _, block_NKD in blocks_of(vectors, items, which=which):
        block_ND = _flat(block_NKD)
        yield block_ND
        progress(len(block_ND))


def _spread(part: Part, count: int) -> NDArray[np.int64]:
    """`count` items of the part, evenly."""
    return part.first_item + np.arange(count) * part.num_items // max(1, count)


def _flat(chosen_NKD: NDArray[np.float32]) -> NDArray[np.float32]:
    return chosen_NKD.reshape(-1, chosen_NKD.shape[-1])
