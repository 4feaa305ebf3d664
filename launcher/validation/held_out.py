"""Held-out pairs: the loss of the run's objective on them, and how well a query finds its target among those
of its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agff.batch import Batch
from agff.collectives import all_gather_rows, max_over_ranks, mean_over_ranks, world_size
from agff.embedder import Embedder
from agff.engine import Engine
from agff.errors import AgffError, ConfigError, DataError, listed
from agff.grad_cache import encode_without_graph
from agff.joined import groups_of, split_into
from agff.recall import RecallScore, places_in_blocks, recall_score
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.once_through import OnceThrough
from data_pipeline.plan import Mixture, Plan
from data_pipeline.remote import open_folder
from data_pipeline.vectors import open_vectors
from launcher.run.config import RunConfig
from launcher.run.data import RunData

DIRECTIONS = ("query to target", "target to query")


@dataclass(frozen=True, kw_only=True)
class HeldOutData(RunData):
    """Shards that are read once through."""

    plan: OnceThrough


def open_held_out(config: RunConfig, training: RunData) -> HeldOutData | None:
    """The shards that validation.shards names; writes nothing. Raises ConfigError, DataError or StorageError.

    Each pair comes once, in batches as large as those of the training (`OnceThrough`).
    """
    wanted = config.validation
    if wanted.shards is None:
        return None
    if config.loss.needs_vectors and wanted.vectors is None:
        raise ConfigError(
            f"objective={config.objective} learns from a teacher's vectors, and for validation.shards="
            f"{wanted.shards} there are none; make them with launcher/embed.py and name their folder "
            "(--validation.vectors DIR)"
        )
    try:
        folder = open_folder(wanted.shards, config.data.cache)
        manifest = _chosen(read_manifest(folder), wanted.sources, folder.location)
        _refuse_trained_on(manifest, training)
        config.loss.check(list(manifest.sources))
        mixture = Mixture(caps=wanted.max_queries, sub_batch_size=config.data.sub_batch_size)
        size = config.batch.global_batch_size
        plan = OnceThrough(manifest, mixture, seed=config.seed, global_batch_size=size)
        vectors = None
        if config.loss.needs_vectors and wanted.vectors is not None:
            vectors = open_vectors(Path(wanted.vectors), manifest, sources=plan.source_names)
    except AgffError as error:
        raise type(error)(f"validation.shards={wanted.shards}: {error}") from None
    return HeldOutData(folder=folder, manifest=manifest, plan=plan, vectors=vectors)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Embeddings and content ids of P pairs of all ranks, on the host; source_P: index into the plan's
    `source_names`."""

    source_P: Tensor
    query_PMD: Tensor
    target_PMD: Tensor
    query_ids_P: Tensor
    target_ids_P: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """Those of several batches."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    def of_source(self, source: int) -> Pairs:
        """Those of one source."""
        return Pairs(**{name: tensor[self.source_P == source] for name, tensor in vars(self).items()})


def encode_batch(
    engine: Engine, config: RunConfig, batch: Batch, *, source_P: np.ndarray
) -> tuple[float, Pairs]:
    """(the objective's loss of the global batch, its pairs).

    source_P: of the rows of all ranks, rank by rank. Collective: every rank must call it with a batch of as
    many pairs.
    """
    batch = batch.to(engine.device)
    num_chunks, num_negatives = max_over_ranks([len(batch.chunks), batch.num_negatives], device=engine.device)
    batch = batch.padded_to(num_chunks=num_chunks, num_negatives=num_negatives)
    shapes = [(chunk["input_ids"].shape[0], chunk["input_ids"].shape[1]) for chunk in batch.chunks]
    groups = groups_of(shapes, engine.first_pass_chunks)
    [num_groups] = max_over_ranks([len(groups)], device=engine.device)
    encoded, _ = encode_without_graph(engine.encode_together, batch.chunks, split_into(groups, num_groups))
    rows = {name: torch.cat([chunk[name] for chunk in encoded]) for name in encoded[0]}
    query, target, negative = batch.split(rows)
    result = config.loss(query, target, negative, batch, config.fusion)
    return mean_over_ranks(result.loss.float()).item(), Pairs(
        source_P=torch.from_numpy(source_P),
        query_PMD=all_gather_rows(query["embedding"]).cpu(),
        target_PMD=all_gather_rows(target["embedding"]).cpu(),
        query_ids_P=all_gather_rows(batch.query_ids_B).cpu(),
        target_ids_P=all_gather_rows(batch.target_ids_B).cpu(),
    )


def sources_of_rows(plan: Plan, step: int) -> np.ndarray:
    """(P,) index of the source of each row of a global batch, rank by rank."""
    ranks = range(world_size())
    return np.concatenate([plan.rank_rows(step, rank=rank, world_size=world_size())[:, 0] for rank in ranks])


def recall_of_source(judge: Embedder, pairs: Pairs) -> list[RecallScore]:
    """R@k in both DIRECTIONS within the pairs of one source.

    Ours: items of equal content are one query and one candidate. Right is every partner of an item; the item
    itself, where it is among the candidates and no partner, is left out.
    """
    queries, targets = (
        _distinct(ids.tolist(), vectors)
        for ids, vectors in (
            (pairs.query_ids_P, pairs.query_PMD),
            (pairs.target_ids_P, pairs.target_PMD),
        )
    )
    together = list(zip(pairs.query_ids_P.tolist(), pairs.target_ids_P.tolist(), strict=True))
    backward = [(target, query) for query, target in together]
    return [
        _one_direction(judge, *sides, partners, direction=direction)
        for sides, partners, direction in (
            ((queries, targets), together, DIRECTIONS[0]),
            ((targets, queries), backward, DIRECTIONS[1]),
        )
    ]


_Side = tuple[dict[int, int], Tensor]
"""({content id: row}, (N, M, D) vectors)."""


def _distinct(ids: Sequence[int], vectors_PMD: Tensor) -> _Side:
    first: dict[int, int] = {}
    for place, content_id in enumerate(ids):
        first.setdefault(content_id, place)
    return {content_id: row for row, content_id in enumerate(first)}, vectors_PMD[list(first.values())]


def _one_direction(
    judge: Embedder, queries: _Side, candidates: _Side, pairs: Sequence[tuple[int, int]], *, direction: str
) -> RecallScore:
    (query_rows, queries_QMD), (candidate_rows, candidates_CMD) = queries, candidates
    own: list[set[int]] = [set() for _ in query_rows]
    for query, candidate in pairs:
        own[query_rows[query]].add(candidate_rows[candidate])
    itself = [candidate_rows.get(content_id) for content_id in query_rows]

    def similarity(rows: slice) -> Tensor:
        similarity_BC = judge.similarity(queries_QMD[rows], candidates_CMD)
        for row, column in enumerate(itself[rows]):
            if column is not None and column not in own[rows][row]:
                similarity_BC[row, column] = -torch.inf
        return similarity_BC

    return recall_score(
        places_in_blocks(similarity, own, num_candidates=len(candidate_rows)),
        [len(columns) for columns in own],
        direction=direction,
        similarity="fused" if queries_QMD.shape[1] > 1 else "global",
        num_candidates=len(candidate_rows),
    )


def _chosen(manifest: Manifest, sources: Sequence[str], location: str) -> Manifest:
    """The manifest with these sources alone; with all where none is named."""
    if not sources:
        return manifest
    if unknown := [name for name in sources if name not in manifest.sources]:
        raise ConfigError(
            f"validation.sources names {', '.join(unknown)}, absent from {location}; it holds "
            f"{', '.join(sorted(manifest.sources))}"
        )
    return Manifest(sources={name: manifest.sources[name] for name in sources}, settings=manifest.settings)


def _refuse_trained_on(manifest: Manifest, training: RunData) -> None:
    trained_on = {
        shard.sha256: f"{training.folder.location}/{name}/{shard.name}"
        for name in training.plan.source_names
        for shard in training.manifest.sources[name].shards
    }
    shared = [
        f"{name}/{shard.name} is {trained_on[shard.sha256]}"
        for name, source in sorted(manifest.sources.items())
        for shard in source.shards
        if shard.sha256 in trained_on
    ]
    if shared:
        what = f"{len(shared)} shards are trained on too, so they are not held out; name other shards, or "
        raise DataError(
            listed(f"{what}leave these sources out of one of the two", shared)
            if len(shared) > 1
            else f"{shared[0]}, which is trained on, so it is not held out; name other shards, or leave its "
            "source out of one of the two (validation.sources, data.weights)"
        )
