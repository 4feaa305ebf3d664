"""Scoring a model on evaluation sets: encode every item of a set once, compare block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from agff.embedder import Embedder
from agff.scoring import MmvpReport, SetScore, mmvp_pair_hits, mmvp_report, precision_at_1_hits, set_score
from data_pipeline.layouts.eval_items import ItemTable
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from launcher.encoding.items import ItemVectors
from launcher.encoding.loading import AnyItem

QUERY_BLOCK_SIZE = 64
"""Most queries compared at once; the result does not depend on it."""
MOST_WASTE = 8
"""Queries are compared with all candidates of their block while these are at most this many times a query's
own: one large product is that much faster than one for each query."""
OWN_BLOCK_BYTES = 2**27
"""Of candidates that are gathered at once for queries whose candidates are their own."""


class Encodes(Protocol):
    """`launcher.encoding.items.encode_items` with the model and the options of a command. Collective."""

    def __call__(self, items: Sequence[AnyItem], *, title: str) -> ItemVectors:
        """The vectors of the items, on every rank."""


def encode_used(encode: Encodes, table: ItemTable) -> tuple[Tensor, dict[int, str]]:
    """((N, M, D) embeddings of a set's items, {item: why it has none}). Collective.

    The row of an item that is not used or has none is zero.
    """
    used = table.used
    found = encode([table.items[index] for index in used], title=table.name)
    refused = {used[position]: reason for position, reason in found.refused.items()}
    if len(used) == len(table.items):  # as usual; a second copy would be gigabytes of a large set
        return found.vectors, refused
    items_NMD = found.vectors.new_zeros(len(table.items), *found.vectors.shape[1:])
    items_NMD[list(used)] = found.vectors
    return items_NMD, refused


def score_set(model: Embedder, eval_set: EvalSet, items_NMD: Tensor) -> SetScore:
    """Precision@1 of one set from the embeddings of its items."""
    hits: list[bool] = []
    for rows, together in query_blocks(eval_set.candidates):
        queries, candidates = eval_set.queries[rows], eval_set.candidates[rows]
        if together is None:
            for some, similarity_BC in similarities_to_own(model, items_NMD, queries, candidates):
                hits += precision_at_1_hits(similarity_BC, [range(len(row)) for row in candidates[some]])
            continue
        similarity_BC = model.similarity(items_NMD[list(queries)], items_NMD[together])
        position = {item: column for column, item in enumerate(together)}
        hits += precision_at_1_hits(similarity_BC, [[position[item] for item in row] for row in candidates])
    return set_score(
        eval_set.name,
        meta_task=eval_set.info.meta_task,
        in_distribution=eval_set.info.in_distribution,
        hits=hits,
        num_candidates=[len(candidates) for candidates in eval_set.candidates],
        num_queries_left_out=eval_set.num_queries_left_out,
        num_candidates_left_out=eval_set.num_candidates_left_out,
    )


def query_blocks(candidates: Sequence[Sequence[int]]) -> Iterator[tuple[slice, list[int] | None]]:
    """(rows, their candidates together; None where these are more than MOST_WASTE times the rows' own)."""
    for start in range(0, len(candidates), QUERY_BLOCK_SIZE):
        block = candidates[start : start + QUERY_BLOCK_SIZE]
        together = list(dict.fromkeys(item for row in block for item in row))
        is_shared = len(together) * len(block) <= MOST_WASTE * sum(map(len, block))
        yield slice(start, start + len(block)), together if is_shared else None


def similarities_to_own(
    model: Embedder, items_NMD: Tensor, queries: Sequence[int], candidates: Sequence[Sequence[int]]
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their (B, C) similarities) of queries whose candidates are their own, C of the longest list:
    gathered into one piece of memory, which is used again, and compared by one batched product."""
    longest = max(map(len, candidates))
    size = max(1, OWN_BLOCK_BYTES // (longest * items_NMD[0].nbytes))
    own_NMD = items_NMD.new_empty(min(size, len(queries)) * longest, *items_NMD.shape[1:])
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        # the filling is no candidate of any row
        index = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in candidates[rows]])
        gathered = own_NMD[: index.numel()]
        torch.index_select(items_NMD, 0, index.flatten().to(items_NMD.device), out=gathered)
        own_BCMD = gathered.view(*index.shape, *items_NMD.shape[1:])
        yield rows, model.similarity_to_own(items_NMD[list(queries[rows])], own_BCMD)


def score_mmvp(model: Embedder, mmvp: MmvpSet, items_NMD: Tensor) -> MmvpReport:
    """Pair accuracy per pattern from the embeddings of the items."""
    similarity_P22 = torch.stack(
        [model.similarity(items_NMD[list(pair.texts)], items_NMD[list(pair.images)]) for pair in mmvp.pairs]
    )
    return mmvp_report(
        [pair.pattern for pair in mmvp.pairs],
        mmvp_pair_hits(similarity_P22).tolist(),
        left_out=[pair.pattern for pair in mmvp.left_out],
    )
