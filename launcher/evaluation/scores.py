"""Scoring a model on evaluation sets: encode every item of a set once, compare block by block."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from agff.batch import Item
from agff.embedder import Embedder
from agff.errors import CheckpointError, DataError
from agff.images import FORMATS, decode_image, open_image
from agff.scoring import MmvpReport, SetScore, mmvp_pair_hits, mmvp_report, precision_at_1_hits, set_score
from data_pipeline.layouts.eval_items import EmbeddedImage, EvalItem, ItemTable
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet

QUERY_BLOCK_SIZE = 64
"""Most queries compared at once; the result does not depend on it."""


def encode_used(model: Embedder, table: ItemTable, *, batch_size: int) -> tuple[Tensor, dict[int, str]]:
    """((N, M, D) embeddings of a set's items, {item: why it has none}).

    The row of an item that is not used or has none is zero.
    """
    used = table.used
    vectors_UMD, refused = encode_items(
        model, [table.items[index] for index in used], batch_size=batch_size, label=table.name
    )
    if len(used) == len(table.items):  # as usual; a second copy would be gigabytes of a large set
        return vectors_UMD, refused
    items_NMD = vectors_UMD.new_zeros(len(table.items), *vectors_UMD.shape[1:])
    items_NMD[list(used)] = vectors_UMD
    return items_NMD, {used[position]: reason for position, reason in refused.items()}


def encode_items(
    model: Embedder, items: Sequence[EvalItem], *, batch_size: int, label: str
) -> tuple[Tensor, dict[int, str]]:
    """((N, M, D) embeddings in order, {position: why an item has none}); the row of such an item is zero.

    At most `batch_size` images are open at a time. Raises CheckpointError for embeddings that are not finite.
    """
    rows: list[Tensor | None] = []
    refused: dict[int, str] = {}
    with tqdm(total=len(items), desc=label, unit="item", file=sys.stderr) as bar:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            try:
                rows += model.encode([model_item(item) for item in batch], batch_size=batch_size)
            except DataError:
                for position, item in enumerate(batch, start=start):
                    try:
                        rows += model.encode([model_item(item)], batch_size=1)
                    except DataError as error:
                        rows.append(None)
                        refused[position] = str(error)
            bar.update(len(batch))
    blank_MD = torch.zeros_like(next((row for row in rows if row is not None), torch.zeros(1, 1)))
    items_NMD = torch.stack([blank_MD if row is None else row for row in rows])
    if not bool(items_NMD.isfinite().all()):
        raise CheckpointError(
            f"{label}: the model gives embeddings that are not finite; its scores would mean nothing"
        )
    return items_NMD.to(model.device), refused


def score_set(model: Embedder, eval_set: EvalSet, items_NMD: Tensor) -> SetScore:
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
        num_queries_left_out=eval_set.num_queries_left_out,
        num_candidates_left_out=eval_set.num_candidates_left_out,
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


def model_item(item: EvalItem) -> Item:
    """The item with its image decoded, and its name as the address of errors."""
    image = None
    if isinstance(item.image, EmbeddedImage):
        image = decode_image(item.image.content, item.name, formats=FORMATS)
    elif item.image is not None:
        image = open_image(item.image, item.name)
    return Item(text=item.text, image=image, address=item.name)
