"""Scoring a model on evaluation sets: encode every item of a set once, compare block by block."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from agff.errors import CheckpointError
from agff.scoring import MmvpReport, SetScore, mmvp_pair_hits, mmvp_report, precision_at_1_hits, set_score
from data_pipeline.layouts.mmeb_eval import EvalItem, EvalSet
from data_pipeline.layouts.mmvp import MmvpPair

QUERY_BLOCK_SIZE = 64
"""Most queries compared at once; the result does not depend on it."""


class EmbeddingModel(Protocol):
    """What is evaluated: agff.embedder.Embedder, or anything that encodes and compares as it does."""

    @property
    def device(self) -> torch.device:
        """Where similarities are computed."""

    def encode(self, items: Sequence[Mapping[str, Any]], *, batch_size: int, progress: bool) -> Tensor:
        """(N, M, D) embeddings of {"text": str, "image": Path} items; "image" may be absent."""

    def similarity(self, a_NMD: Tensor, b_CMD: Tensor) -> Tensor:
        """(N, C) fused similarity."""


def encode_items(model: EmbeddingModel, items: Sequence[EvalItem], *, batch_size: int, label: str) -> Tensor:
    """(N, M, D) embeddings of the items, in order; at most `batch_size` images are open at a time."""
    embeddings = []
    with tqdm(total=len(items), desc=label, unit="item", file=sys.stderr) as bar:
        for start in range(0, len(items), batch_size):
            batch = [_model_item(item) for item in items[start : start + batch_size]]
            embeddings.append(model.encode(batch, batch_size=batch_size, progress=False))
            bar.update(len(batch))
    items_NMD = torch.cat(embeddings)
    if not bool(items_NMD.isfinite().all()):
        raise CheckpointError(
            f"{label}: the model gives embeddings that are not finite; its scores would mean nothing"
        )
    return items_NMD.to(model.device)


def score_set(model: EmbeddingModel, eval_set: EvalSet, items_NMD: Tensor) -> SetScore:
    """Precision@1 of one set from the embeddings of its items."""
    hits: list[bool] = []
    for rows, columns in query_blocks(eval_set.candidates, max_rows=QUERY_BLOCK_SIZE):
        similarity_BC = model.similarity(items_NMD[list(eval_set.queries[rows])], items_NMD[columns])
        position = {item: column for column, item in enumerate(columns)}
        hits += precision_at_1_hits(
            similarity_BC,
            [[position[item] for item in candidates] for candidates in eval_set.candidates[rows]],
        )
    return set_score(
        eval_set.name,
        meta_task=eval_set.info.meta_task,
        in_distribution=eval_set.info.in_distribution,
        hits=hits,
        num_candidates=[len(candidates) for candidates in eval_set.candidates],
    )


def query_blocks(candidates: Sequence[Sequence[int]], *, max_rows: int) -> Iterator[tuple[slice, list[int]]]:
    """(rows, their candidates together) such that at most twice the needed similarities are computed.

    Queries that share their candidates form large blocks; queries whose thousand candidates are their own
    stay alone.
    """
    start, together = 0, dict.fromkeys(candidates[0]) if candidates else {}
    for row in range(1, len(candidates)):
        joined = {**together, **dict.fromkeys(candidates[row])}
        if row - start == max_rows or len(joined) > 2 * len(candidates[row]):
            yield slice(start, row), list(together)
            start, joined = row, dict.fromkeys(candidates[row])
        together = joined
    if candidates:
        yield slice(start, len(candidates)), list(together)


def score_mmvp(model: EmbeddingModel, pairs: Sequence[MmvpPair], *, batch_size: int) -> MmvpReport:
    """Pair accuracy per pattern."""
    items = list(dict.fromkeys(item for pair in pairs for item in (*pair.texts, *pair.images)))
    position = {item: index for index, item in enumerate(items)}
    items_NMD = encode_items(model, items, batch_size=batch_size, label="MMVP")
    similarity_P22 = torch.stack(
        [
            model.similarity(
                items_NMD[[position[text] for text in pair.texts]],
                items_NMD[[position[image] for image in pair.images]],
            )
            for pair in pairs
        ]
    )
    return mmvp_report([pair.pattern for pair in pairs], mmvp_pair_hits(similarity_P22).tolist())


def _model_item(item: EvalItem) -> dict[str, Any]:
    return {"text": item.text} if item.image_path is None else {"text": item.text, "image": item.image_path}
