"""Items -> vectors on any number of ranks, the same bits on any number of them.

Batches are cut from one list that is sorted by length and does not depend on the number of ranks; then they
are dealt to the ranks. So which items share a batch, and with it the rounding, is always the same.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from agff.collectives import gather_objects, rank, world_size
from agff.embedder import Embedder
from agff.errors import CheckpointError, DataError
from launcher.encoding.loading import AnyItem, loaded_batches, outline
from launcher.encoding.vector_cache import VectorCache
from launcher.run.meeting import together


@dataclass(frozen=True, kw_only=True)
class ItemVectors:
    """What a model says of items; the same on every rank."""

    vectors: Tensor
    """(N, M, D) float32 on the model's device; zero where an item has none."""
    refused: Mapping[int, str]
    """{position: why the item has none}."""


def encode_items(
    model: Embedder,
    items: Sequence[AnyItem],
    *,
    batch_size: int,
    title: str,
    num_workers: int = 0,
    cache: VectorCache | None = None,
) -> ItemVectors:
    """The vectors of all items, on every rank. Each item is encoded once, wherever its rank is; equal items
    are the caller's to join.

    batch_size: items in a forward. num_workers: processes of this rank that load while the model computes.
    cache: what is in it is not encoded again. title: of the progress bar and of errors.

    Collective: every rank must call it with the same items; without a process group it is one process's
    work. Raises CheckpointError on all ranks for vectors that are not finite.
    """
    keys = cache.keys(items) if cache is not None else None
    places, kept = cache.read(keys) if cache is not None and keys is not None else ([], None)
    wanted = sorted(set(range(len(items))) - set(places))
    batches = batches_by_length(model, items, wanted, batch_size=batch_size)
    own, refused = _encode_own(model, items, batches[rank() :: world_size()], title, num_workers=num_workers)
    vectors_NMD = _assemble(own, batches, kept, places, num_items=len(items), device=model.device)
    if cache is not None and keys is not None:
        cache.write(keys, vectors_NMD, [place for place in wanted if place not in refused])
    return ItemVectors(vectors=vectors_NMD, refused=refused)


def batches_by_length(
    model: Embedder, items: Sequence[AnyItem], wanted: Sequence[int], *, batch_size: int
) -> list[list[int]]:
    """Positions of the wanted items, the longest first, cut into batches. Collective."""
    own = {place: length_of(model, items[place]) for place in wanted[rank() :: world_size()]}
    length = {place: value for part in gather_objects(own) for place, value in part.items()}
    order = sorted(wanted, key=lambda place: (-length[place], place))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def length_of(model: Embedder, item: AnyItem) -> int:
    """Tokens of an item; 0 where it cannot be used, which shows when it is loaded."""
    try:
        return model.processor.num_tokens(outline(item))
    except (DataError, OSError):
        return 0


def _encode_own(
    model: Embedder,
    items: Sequence[AnyItem],
    batches: Sequence[Sequence[int]],
    title: str,
    *,
    num_workers: int,
) -> tuple[Tensor | None, dict[int, str]]:
    """((n, M, D) vectors of this rank's batches, zero where an item has none; None where there is nothing;
    the refused items of all ranks). Collective."""
    own, own_refused = together(
        lambda: _encode_batches(model, items, batches, title, num_workers=num_workers)
    )
    refused = {place: reason for part in gather_objects(own_refused) for place, reason in part.items()}
    return own, dict(sorted(refused.items()))


def _encode_batches(
    model: Embedder,
    items: Sequence[AnyItem],
    batches: Sequence[Sequence[int]],
    title: str,
    *,
    num_workers: int,
) -> tuple[Tensor | None, dict[int, str]]:
    own: Tensor | None = None
    refused: dict[int, str] = {}
    num_items, start = sum(map(len, batches)), 0
    loaded = loaded_batches(model.processor, items, batches, num_workers=num_workers)
    with (
        contextlib.closing(loaded),
        tqdm(total=num_items, desc=title, unit="item", file=sys.stderr, disable=rank() > 0) as bar,
    ):
        for positions, batch in zip(batches, loaded, strict=True):
            refused.update(batch.refused)
            if batch.positions:
                found = model.encode_inputs(batch.inputs)
                if own is None:
                    own = found.new_zeros(num_items, *found.shape[1:])
                place = {position: start + number for number, position in enumerate(positions)}
                own[[place[position] for position in batch.positions]] = found
            start += len(positions)
            bar.update(len(positions))
    if own is not None and not bool(own.isfinite().all()):
        raise CheckpointError(
            f"{title}: the model gives embeddings that are not finite; its scores would mean nothing"
        )
    return own, refused


def _assemble(
    own: Tensor | None,
    batches: Sequence[Sequence[int]],
    kept: Tensor | None,
    places: Sequence[int],
    *,
    num_items: int,
    device: torch.device,
) -> Tensor:
    """(N, M, D) the vectors of all ranks, and those that were kept, in their places. Collective."""
    known = next((part for part in (own, kept) if part is not None), None)
    shapes = [shape for shape in gather_objects(known.shape[1:] if known is not None else None) if shape]
    shape = shapes[0] if shapes else torch.Size((1, 1))
    vectors_NMD = torch.zeros(num_items, *shape, device=device)
    parts = [(0, list(places), kept)]
    for source in range(world_size()):
        parts.append((source, [place for batch in batches[source :: world_size()] for place in batch], own))
    for source, order, part in parts:
        if not order:
            continue
        if part is None or source != rank():
            part = torch.zeros(len(order), *shape)
        part_PMD = part.to(device)
        if world_size() > 1:
            dist.broadcast(part_PMD, src=source)
        vectors_NMD[order] = part_PMD
    return vectors_NMD
