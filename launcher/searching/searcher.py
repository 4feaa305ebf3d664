"""Search in two stages: FAISS gives k x factor candidates, the fused similarity ranks them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agff.errors import ConfigError, DataError
from agff.similarity import fused_similarity
from launcher.searching.faiss_part import FaissPart
from launcher.searching.index_folder import FINE, GLOBAL, Group, open_folder
from launcher.searching.vector_blocks import blocks_of


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An item that was found."""

    row: int
    score: float
    """Fused similarity, in [-1, 1]."""


class Searcher:
    """An opened index, for any number of queries. Of its files only the pages they look at are read.

    Each process opens its own: FAISS, like torch, hangs in a process forked after its threads have worked.
    """

    def __init__(self, folder: Path, *, check_hashes: bool = False) -> None:
        """Raises DataError for an index that is not as it was written, ConfigError without FAISS."""
        self.folder = folder
        self.description, self.vectors = open_folder(folder, check_hashes=check_hashes)
        dim = self.vectors.vectors.shape[2]
        self._groups = {
            name: _OpenGroup(folder, group, dim) for name, group in self.description.groups.items()
        }

    @property
    def has_fine(self) -> bool:
        """Whether it was built with the fine vectors."""
        return FINE in self._groups

    def check_request(self, k: int, factor: int) -> None:
        """Raise ConfigError for what the index cannot give."""
        if k < 1 or factor < 1:
            raise ConfigError(f"--k {k}, --factor {factor}: both must be >= 1")
        if k > (num_items := self.description.num_items):
            raise ConfigError(f"--k {k}: {self.folder} has {num_items:,} items; give at most that many")

    def candidates(self, query_MD: Tensor, count: int, *, with_fine: bool) -> NDArray[np.int64]:
        """Rows of the `count` items whose global vector is nearest to the query's, in increasing order.

        with_fine: the union of the searches by each of the query's vectors, among the global and among the
        fine ones, `count` vectors each: what is near in one fine vector alone is found too.
        """
        query_MD_ = query_MD.float().contiguous().numpy()
        if not with_fine:
            return self._groups[GLOBAL].nearest_items(query_MD_[:1], count)
        found = [group.nearest_items(query_MD_, count) for group in self._groups.values()]
        return np.unique(np.concatenate(found))

    def score(self, query_MD: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """(len(rows),) fused similarities of the query and these items. Memory: that of a block of them.

        Raises DataError for items whose vectors are not finite.
        """
        beta = self.vectors.fusion.beta
        blocks = (torch.from_numpy(block_CMD) for _, block_CMD in blocks_of(self.vectors, rows))
        return torch.cat([fused_similarity(query_MD[None], block_CMD, beta=beta)[0] for block_CMD in blocks])

    def search(self, query_MD: Tensor, *, k: int, factor: int) -> list[Hit]:
        """The best `k` of the candidates, best first; equal scores in the order of their rows.

        Candidates are found by every vector where the index has the fine ones, else by the global one.

        query_MD: unit vectors of the model that made the index. Raises ConfigError, DataError for vectors
        that are not finite.
        """
        self.check_request(k, factor)
        if not query_MD.isfinite().all():
            raise DataError(
                f"the model {self.vectors.description.model} gives vectors of the query that are not finite; "
                "they would mean nothing"
            )
        rows = self.candidates(query_MD, k * factor, with_fine=self.has_fine)
        scores = self.score(query_MD, rows)
        best = scores.sort(descending=True, stable=True).indices[:k].tolist()
        return [Hit(row=int(rows[place]), score=float(scores[place])) for place in best]


class _OpenGroup:
    """The mapped parts of a group."""

    def __init__(self, folder: Path, group: Group, dim: int) -> None:
        self._group = group
        self._parts = [
            FaissPart(folder / part.file, group.kind, num_rows=part.num_items * group.num_vectors, dim=dim)
            for part in group.parts
        ]

    def nearest_items(self, query_QD: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """Items of the `count` vectors nearest to each query, without repetition, in increasing order."""
        scores, items = [], []
        for part, opened in zip(self._group.parts, self._parts, strict=True):
            part_scores, rows = opened.nearest(query_QD, count)
            scores.append(part_scores)
            items.append(part.first_item + rows // self._group.num_vectors)
        joined_QC, items_QC = np.concatenate(scores, axis=1), np.concatenate(items, axis=1)
        best_QC = np.argsort(-joined_QC, axis=1, kind="stable")[:, :count]
        return np.unique(np.take_along_axis(items_QC, best_QC, axis=1))
