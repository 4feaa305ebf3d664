"""A folder of vectors -> a search index, written beside its name and given it at the end."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agff.errors import ConfigError, DataError
from agff.files import file_fingerprint, locked, partial_path, sync
from launcher.embedding.vectors_folder import DESCRIPTION_FILE, VectorsFolder
from launcher.searching.faiss_part import (
    PART_BYTES,
    Kind,
    Storage,
    faiss,
    kind_for,
    num_training_rows,
    row_bytes,
    write_part,
)
from launcher.searching.index_folder import (
    FINE,
    GLOBAL,
    VECTORS_FOLDER,
    Group,
    IndexDescription,
    Part,
    write_description,
)

BLOCK_BYTES = 64 * 2**20
"""Of vectors in float32 that are read at once."""


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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.with_name(f".{out.name}.lock"), wait=False) as is_ours:
            if not is_ours:
                raise ConfigError(f"{out}: another process is writing it; wait for it, or choose another")
            if out.exists():
                raise ConfigError(f"{out} exists already; choose another folder or remove it")
            vectors = VectorsFolder(vectors_folder, check_hashes=True)
            if choice.with_fine and vectors.description.num_vectors == 1:
                raise ConfigError(f"{vectors_folder}: its items have no fine vectors; leave --fine out")
            return _build(vectors, out, choice, progress)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written: {error.strerror or error}; choose another folder or make room"
        ) from None


def _build(
    vectors: VectorsFolder, out: Path, choice: IndexChoice, progress: Callable[[int], object]
) -> IndexDescription:
    for left in out.parent.glob(f"{out.name}.{socket.gethostname()}-*.partial"):  # of a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = partial_path(out)
    try:
        folder.mkdir()
        _link(vectors.folder, folder / VECTORS_FOLDER, [*vectors.description.files, DESCRIPTION_FILE])
        groups = {GLOBAL: _write_group(vectors, folder, GLOBAL, choice, progress)}
        if choice.with_fine:
            groups[FINE] = _write_group(vectors, folder, FINE, choice, progress)
        names = [part.file for group in groups.values() for part in group.parts]
        names.append(f"{VECTORS_FOLDER}/{DESCRIPTION_FILE}")
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


def _write_group(
    vectors: VectorsFolder, folder: Path, name: str, choice: IndexChoice, progress: Callable[[int], object]
) -> Group:
    num_items, (num_vectors, dim) = len(vectors), vectors.vectors.shape[1:]
    per_item = 1 if name == GLOBAL else num_vectors - 1
    kind = choice.kind or kind_for(num_items * per_item, dim, choice.storage)
    size = max(1, choice.part_bytes // (per_item * row_bytes(dim, choice.storage)))
    parts: list[Part] = []
    for first in range(0, num_items, size):
        part = Part(
            file=f"{name}-{len(parts):05d}.faiss", first_item=first, num_items=min(size, num_items - first)
        )
        rows = _Rows(vectors, 0 if name == GLOBAL else 1, per_item)
        num_rows = part.num_items * per_item
        write_part(
            folder / part.file,
            rows.blocks(part, progress),
            kind=kind,
            storage=choice.storage,
            num_rows=num_rows,
            training_ND=rows.sample(part, num_training_rows(kind, choice.storage, num_rows)),
        )
        parts.append(part)
    return Group(kind=kind, first_vector=0 if name == GLOBAL else 1, num_vectors=per_item, parts=tuple(parts))


@dataclass(frozen=True)
class _Rows:
    """The vectors of one sort, in float32, as FAISS takes them."""

    vectors: VectorsFolder
    first_vector: int
    per_item: int

    def blocks(self, part: Part, progress: Callable[[int], object]) -> Iterator[NDArray[np.float32]]:
        """(n, D) of the part's items in turn. Raises DataError for a vector that is not finite."""
        dim = self.vectors.vectors.shape[2]
        step = max(1, BLOCK_BYTES // (4 * dim * self.per_item))
        end = part.first_item + part.num_items
        for start in range(part.first_item, end, step):
            block_ND = self._of(slice(start, min(start + step, end)))
            if not np.isfinite(block_ND).all():
                row = start + int(np.argmin(np.isfinite(block_ND).all(axis=1))) // self.per_item
                raise DataError(
                    f"{self.vectors.folder}: the vectors of item {self.vectors.item(row).id} (row {row:,}) "
                    "hold NaN or infinity; make them again with launcher/embed.py"
                )
            yield block_ND
            progress(len(block_ND))

    def sample(self, part: Part, count: int) -> NDArray[np.float32]:
        """(count, D) or a little more, of items spread over the part."""
        num_items = -(-count // self.per_item)
        return self._of(part.first_item + np.arange(num_items) * part.num_items // max(1, num_items))

    def _of(self, items: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        chosen_NKD = self.vectors.vectors[items, self.first_vector : self.first_vector + self.per_item]
        return np.ascontiguousarray(chosen_NKD, dtype=np.float32).reshape(-1, chosen_NKD.shape[-1])
