"""The most similar candidates of queries by the fused similarity, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agff.similarity import fused_similarity
from launcher.mining.rules import Ranked

CANDIDATES = 4096
"""Compared at once: with a block of queries, 16 MB of similarities."""


def best_candidates(
    query_BMD: NDArray,
    vectors_NMD: NDArray,
    candidates: NDArray[np.int64],
    *,
    positive_B: NDArray[np.int64],
    excluded: Sequence[Sequence[int]],
    num_ranks: int,
    beta: float,
    device: torch.device,
) -> Ranked:
    """The `num_ranks` best of each query, without those that are excluded.

    vectors_NMD: may be memory-mapped; a block of its rows is read at a time. candidates: (C,) the rows that
    are candidates. positive_B: which candidate is each query's own positive. excluded: of each query the
    candidates that are not looked at; the positive is among them.
    """
    queries = torch.from_numpy(np.asarray(query_BMD, dtype=np.float32)).to(device)
    row, column = (pairs.to(device) for pairs in _pairs(excluded))
    positive = torch.from_numpy(positive_B).to(device)
    best_index = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    best = torch.empty(len(queries), 0, device=device)
    found_positive_B = torch.full((len(queries),), torch.nan, device=device)
    for start in range(0, len(candidates), CANDIDATES):
        rows = candidates[start : start + CANDIDATES]
        block = torch.from_numpy(np.asarray(vectors_NMD[rows], dtype=np.float32)).to(device)
        similarity_BC = fused_similarity(queries, block, beta=beta)
        is_here = (positive >= start) & (positive < start + len(rows))
        found_positive_B[is_here] = similarity_BC[is_here, positive[is_here] - start]
        of_block = (column >= start) & (column < start + len(rows))
        similarity_BC[row[of_block], column[of_block] - start] = -torch.inf
        index_BC = torch.arange(start, start + len(rows), device=device).expand(len(queries), -1)
        # those of earlier blocks are in front, so a stable order leaves the lower index first
        best, best_index = _largest(
            torch.cat([best, similarity_BC], dim=1), torch.cat([best_index, index_BC], dim=1), num_ranks
        )
    return Ranked(
        index_BR=best_index.masked_fill(best == -torch.inf, -1).cpu(),
        similarity_BR=best.cpu(),
        positive_B=found_positive_B.cpu(),
    )


def _largest(values_BC: Tensor, index_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    ordered = values_BC.sort(dim=1, descending=True, stable=True)
    order_BR = ordered.indices[:, :count]
    return ordered.values[:, :count], index_BC.gather(1, order_BR)


def _pairs(lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(row, value) of every value of every list."""
    rows = torch.tensor([row for row, values in enumerate(lists) for _ in values], dtype=torch.int64)
    return rows, torch.tensor([value for values in lists for value in values], dtype=torch.int64)
