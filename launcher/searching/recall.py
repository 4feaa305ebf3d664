"""How much of the exhaustive fused search the two stages find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agff.similarity import fused_similarity
from launcher.embedding.vectors_folder import VectorsFolder
from launcher.searching.searcher import Searcher
from launcher.searching.vector_blocks import blocks_of, vectors_of

FACTORS = (1, 4, 16)
QUERY_BLOCK = 256
SAME_SCORE = 1e-6
"""In units of cosine: the rounding between two shapes of the same products."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Of one way to search."""

    factor: int
    with_fine: bool
    recall: float
    """Share, in percent, of the k best of the exhaustive search that are found; mean over queries. An item
    counts by its score, so of equal ones any will do."""
    num_candidates: float
    """Items whose fused similarity was computed, mean over queries."""


def query_rows(num_items: int, count: int) -> list[int]:
    """At most `count` rows, spread evenly."""
    count = min(count, num_items)
    return [place * num_items // count for place in range(count)]


def exhaustive_scores(
    query_QMD: Tensor, corpus: VectorsFolder, k: int, *, own_rows: Sequence[int] | None
) -> Tensor:
    """(Q, k) the best fused similarities of each query among the whole corpus, best first.

    own_rows: the queries' own rows of the corpus, which are left out. Memory: a block of the corpus and
    QUERY_BLOCK queries against it, whatever their numbers. Raises DataError for vectors that are not finite.
    """
    found = []
    for start in range(0, len(query_QMD), QUERY_BLOCK):
        queries = query_QMD[start : start + QUERY_BLOCK]
        own = own_rows[start : start + QUERY_BLOCK] if own_rows is not None else None
        best_Qk = torch.full((len(queries), k), -torch.inf)
        for first, block_CMD in blocks_of(corpus, range(len(corpus))):
            scores_QC = fused_similarity(queries, torch.from_numpy(block_CMD), beta=corpus.fusion.beta)
            for place, row in enumerate(own or ()):
                if first <= row < first + len(block_CMD):
                    scores_QC[place, row - first] = -torch.inf
            best_Qk = torch.cat([best_Qk, scores_QC], dim=1).topk(k, dim=1).values
        found.append(best_Qk)
    return torch.cat(found)


def measure_recall(
    searcher: Searcher, queries: VectorsFolder | None, *, num_queries: int, k: int
) -> list[Recall]:
    """At each of FACTORS with the global vectors, and with the fine ones where the index has them.

    queries: None takes items of the corpus, each searched among the others.
    """
    source = searcher.vectors if queries is None else queries
    rows = query_rows(len(source), num_queries)
    query_QMD = torch.from_numpy(vectors_of(source, np.array(rows)))
    own_rows = rows if queries is None else None
    truth_Qk = exhaustive_scores(query_QMD, searcher.vectors, k, own_rows=own_rows)
    return [
        _recall(searcher, query_QMD, truth_Qk, own_rows, factor=factor, with_fine=with_fine)
        for with_fine in ((False, True) if searcher.has_fine else (False,))
        for factor in FACTORS
    ]


def _recall(
    searcher: Searcher,
    query_QMD: Tensor,
    truth_Qk: Tensor,
    own_rows: Sequence[int] | None,
    *,
    factor: int,
    with_fine: bool,
) -> Recall:
    k = truth_Qk.shape[1]
    num_found = num_candidates = 0
    for place, (query_MD, truth_k) in enumerate(zip(query_QMD, truth_Qk, strict=True)):
        # a query of the corpus finds itself, which is not counted
        count = k * factor + (own_rows is not None)
        rows = searcher.candidates(query_MD, count, with_fine=with_fine)
        if own_rows is not None:
            rows = rows[rows != own_rows[place]]
        scores = searcher.score(query_MD, rows)
        num_found += min(k, int((scores >= truth_k[-1] - SAME_SCORE).sum()))
        num_candidates += len(rows)
    num_queries = len(query_QMD)
    return Recall(
        factor=factor,
        with_fine=with_fine,
        recall=100 * num_found / (k * num_queries),
        num_candidates=num_candidates / num_queries,
    )


def recall_table(found: Sequence[Recall], *, num_items: int) -> str:
    """The lines of a table in Markdown."""
    lines = ["| searched by | factor | candidates re-scored | recall |", "|---|---|---|---|"]
    for each in found:
        by = "every vector" if each.with_fine else "the global vector"
        share = f"{each.num_candidates:,.1f} ({each.num_candidates / num_items:.1%})"
        lines.append(f"| {by} | {each.factor} | {share} | {each.recall:.1f} % |")
    return "\n".join(lines)
