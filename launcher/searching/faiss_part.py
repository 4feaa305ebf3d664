"""One FAISS file: which kind for how many vectors, written in blocks, read in place.

    flat   compares a query with every vector: exact, at most FLAT_MOST_ROWS
    hnsw   a graph of neighbours: at most HNSW_MOST_BYTES of vectors, since each step reads somewhere else
    ivf    lists of vectors around centroids, of which a query reads one in LISTS_READ: everything larger

As many as are asked for are found: where the lists hold too few, more are read; where the graph does not
reach them, all vectors are compared.

float32 keeps the vectors, int8 a quarter of them (a scalar quantizer: 256 levels between the smallest and the
largest value of each dimension). An index is cut into parts of at most PART_BYTES, and each is mapped into
memory, not read: building needs the memory of one part and its training sample, searching that of the pages
it looks at. FAISS's own merged lists on disk would keep the name of the file that was first written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from agff.errors import ConfigError, DataError

Kind = Literal["flat", "hnsw", "ivf"]
Storage = Literal["float32", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STORAGES: tuple[Storage, ...] = get_args(Storage)

FLAT_MOST_ROWS = 100_000
"""0.3 GFLOP a query at D = 1,536."""
HNSW_MOST_BYTES = 2 * 2**30
PART_BYTES = 2**30
"""Of vectors, as they are stored."""
LISTS_READ = 16
MIN_LISTS_READ = 8
_ROWS_PER_LIST = 39
"""FAISS's own least number of training vectors for a centroid."""
_QUANTIZER_ROWS = 2**14
"""Vectors whose range int8 is trained on."""
_NEIGHBOURS = 32
"""Of a vector in the graph, on its upper layers."""
_SEARCHED = 128
"""Vectors that a search of the graph keeps in view, at least."""


def faiss() -> Any:
    """The library, with as many threads as torch has.

    Where torch is imported first, as here, both run on its OpenMP (Linux wheels); else each has its own, and
    they work in turn.

    Raises ConfigError where it is not installed.
    """
    try:
        import faiss as library
    except ImportError as error:
        raise ConfigError(
            f"an index needs FAISS, which cannot be imported: {error}; pip install faiss-cpu"
        ) from None
    library.omp_set_num_threads(torch.get_num_threads())
    return library


def faiss_path(path: Path) -> str:
    """As FAISS takes it. Raises ConfigError for a name that no UTF-8 has."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{path}: FAISS opens only names in UTF-8; choose another folder") from None
    return str(path)


def row_bytes(dim: int, storage: Storage) -> int:
    """Of a stored vector."""
    return dim if storage == "int8" else 4 * dim


def kind_for(num_rows: int, dim: int, storage: Storage) -> Kind:
    """What is built where nobody says."""
    if num_rows <= FLAT_MOST_ROWS:
        return "flat"
    return "hnsw" if num_rows * row_bytes(dim, storage) <= HNSW_MOST_BYTES else "ivf"


def num_training_rows(kind: Kind, storage: Storage, num_rows: int) -> int:
    """How many of a part's vectors are to be seen before it is filled."""
    if kind == "ivf":
        return min(num_rows, (_ROWS_PER_LIST + 1) * _num_lists(num_rows))
    return min(num_rows, _QUANTIZER_ROWS) if storage == "int8" else 0


def write_part(
    path: Path,
    blocks: Iterable[NDArray[np.float32]],
    *,
    kind: Kind,
    storage: Storage,
    num_rows: int,
    training_ND: NDArray[np.float32],
) -> None:
    """Write the (n, D) blocks, together `num_rows` vectors, as one file. Raises OSError.

    training_ND: `num_training_rows` of them, spread over the whole part; (0, D) where none are needed.
    """
    index = _empty(kind, storage, num_rows, training_ND.shape[1])
    if len(training_ND):
        index.train(training_ND)
    for block_ND in blocks:
        index.add(block_ND)
    try:
        faiss().write_index(index, faiss_path(path))
    except RuntimeError as error:
        raise OSError(_reason(error)) from None


class FaissPart:
    """A file that `write_part` wrote, mapped into memory."""

    def __init__(self, path: Path, kind: Kind, *, num_rows: int, dim: int) -> None:
        """Raises DataError for what is no such file."""
        library = faiss()
        flag = library.IO_FLAG_MMAP if kind == "ivf" else library.IO_FLAG_MMAP_IFC
        try:
            index = library.read_index(faiss_path(path), flag | library.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be read: {_reason(error)}; build the index again") from None
        expected = {
            "flat": (library.IndexFlat, library.IndexScalarQuantizer),
            "hnsw": (library.IndexHNSW,),
            "ivf": (library.IndexIVF,),
        }[kind]
        if not isinstance(index, expected) or (index.ntotal, index.d) != (num_rows, dim):
            raise DataError(
                f"{path}: holds {type(index).__name__} of {index.ntotal:,} vectors of {index.d} dimensions, "
                f"must be {kind} of {num_rows:,} of {dim}; build the index again"
            )
        self._kind, self._index, self._path = kind, index, path

    def nearest(
        self, query_QD: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(Q, count) dot products and rows, best first; all rows where `count` is more.

        Raises DataError for rows that are not there.
        """
        count = min(count, self._index.ntotal)
        scores, rows = self._search(query_QD, count)
        if ((rows < 0) | (rows >= self._index.ntotal)).any():
            raise DataError(f"{self._path}: is damaged, as its rows show; build the index again")
        return scores, rows

    def _search(
        self, query_QD: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """`nearest`; row -1 for each that is not found."""
        if self._kind == "flat":
            return self._index.search(query_QD, count)
        if self._kind == "hnsw":
            parameters = faiss().SearchParametersHNSW(efSearch=max(_SEARCHED, 2 * count))
            found = self._index.search(query_QD, count, params=parameters)
            if (found[1] < 0).any():  # equal vectors have each other as neighbours, and the graph falls apart
                return faiss().downcast_index(self._index.storage).search(query_QD, count)
            return found
        num_lists = max(MIN_LISTS_READ, self._index.nlist // LISTS_READ)
        while True:
            parameters = faiss().SearchParametersIVF(nprobe=min(num_lists, self._index.nlist))
            found = self._index.search(query_QD, count, params=parameters)
            if num_lists >= self._index.nlist or (found[1] >= 0).all():
                return found
            num_lists *= 2


def _empty(kind: Kind, storage: Storage, num_rows: int, dim: int) -> Any:
    library = faiss()
    metric, levels = library.METRIC_INNER_PRODUCT, library.ScalarQuantizer.QT_8bit
    if kind == "flat":
        if storage == "int8":
            return library.IndexScalarQuantizer(dim, levels, metric)
        return library.IndexFlatIP(dim)
    if kind == "hnsw":
        if storage == "int8":
            return library.IndexHNSWSQ(dim, levels, _NEIGHBOURS, metric)
        return library.IndexHNSWFlat(dim, _NEIGHBOURS, metric)
    lists = (library.IndexFlatIP(dim), dim, _num_lists(num_rows))
    if storage == "int8":
        index = library.IndexIVFScalarQuantizer(*lists, levels, metric)
    else:
        index = library.IndexIVFFlat(*lists, metric)
    index.cp.min_points_per_centroid = 1  # a tiny index is no reason for its warning
    return index


def _num_lists(num_rows: int) -> int:
    return max(1, min(4 * math.isqrt(num_rows), num_rows // _ROWS_PER_LIST))


def _reason(error: RuntimeError) -> str:
    """Of FAISS's text, which begins with a C++ signature, the sentence at its end."""
    return str(error).rpartition("Error: ")[2].replace(os.linesep, " ") or "FAISS gives no reason"
