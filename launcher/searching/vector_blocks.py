"""Vectors of a folder in float32, some at once, each of them finite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from agff.errors import DataError
from launcher.embedding.vectors_folder import VectorsFolder

BLOCK_BYTES = 64 * 2**20
"""Of vectors in float32 that are read at once."""
ALL = slice(None)


def blocks_of(
    vectors: VectorsFolder, rows: range | NDArray[np.int64], *, which: slice = ALL
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(place among `rows` of the first, `vectors_of`) in turn, BLOCK_BYTES at once, or one item."""
    num_vectors, dim = vectors.vectors[:1, which].shape[1:]
    step = max(1, BLOCK_BYTES // (4 * num_vectors * dim))
    for start in range(0, len(rows), step):
        yield start, vectors_of(vectors, rows[start : start + step], which=which)


def vectors_of(
    vectors: VectorsFolder, rows: range | NDArray[np.int64], *, which: slice = ALL
) -> NDArray[np.float32]:
    """(len(rows), K, D) of these items; which: of an item's vectors. Raises DataError for one that is not
    finite: no score would mean anything."""
    chosen_NKD = np.ascontiguousarray(vectors.vectors[np.asarray(rows), which], dtype=np.float32)
    finite_N = np.isfinite(chosen_NKD).all(axis=(1, 2))
    if not finite_N.all():
        row = int(rows[int(np.argmin(finite_N))])
        raise DataError(
            f"{vectors.folder}: the vectors of item {vectors.item(row).id!r} (row {row:,}) hold NaN or "
            "infinity; make them again with launcher/embed.py"
        )
    return chosen_NKD
