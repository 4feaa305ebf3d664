"""Items that are no batch, encoded by all ranks together: each takes every `world_size`-th chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from agff.batch import Encoded, ModelInputs
from agff.collectives import all_gather_rows, max_over_ranks, rank, world_size


def own_chunks(chunks: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Those that this rank encodes."""
    return chunks[rank() :: world_size()]


def encode_shared(
    encode: Callable[[ModelInputs], Encoded],
    chunks: Sequence[Sequence[int]],
    inputs: Iterable[ModelInputs | None],
    *,
    filler: ModelInputs,
    num_items: int,
    device: torch.device,
    should_stop: Callable[[], bool],
) -> Tensor | None:
    """(N, M, D) embeddings of all items on the host of every rank, the same bits on each of them; None where
    a rank stopped it.

    chunks: indices of the items of each chunk, the same on every rank. inputs: of `own_chunks`, made when
    they are asked for; None stops all ranks. should_stop: asked before each chunk, and one rank's True stops
    all of them.

    Collective: every rank must call it with the same chunks. A rank without a chunk in the last round
    encodes `filler`, so that under ZeRO-3 all ranks call the same modules equally often.
    """
    items_NMD: Tensor | None = None
    ready = iter(inputs)
    for start in range(0, len(chunks), world_size()):
        together = chunks[start : start + world_size()]
        own = together[rank()] if rank() < len(together) else ()
        of_chunk = next(ready) if own else filler
        if max_over_ranks([of_chunk is None or should_stop()], device=device)[0]:
            return None
        assert of_chunk is not None
        with torch.no_grad():
            own_RMD = encode(of_chunk)["embedding"][: len(own)]
            # as many rows on each rank as the gather wants
            padded_RMD = own_RMD.new_zeros(max(map(len, together)), *own_RMD.shape[1:])
            padded_RMD[: len(own)] = own_RMD
            of_ranks = all_gather_rows(padded_RMD).cpu().split(len(padded_RMD))
        if items_NMD is None:
            items_NMD = of_ranks[0].new_zeros(num_items, *own_RMD.shape[1:])
        for chunk, rows_RMD in zip(together, of_ranks, strict=False):
            items_NMD[list(chunk)] = rows_RMD[: len(chunk)]
    return items_NMD
