"""The data of a run: its shards, their plan and the batches of a rank."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agff.backbone_folder import check_backbone_folder
from agff.batch import Batch, ProcessItems
from agff.collectives import gather_objects, rank
from agff.errors import ConfigError, DataError, listed
from agff.processor import ItemProcessor
from agff.text_only import TextsAlone
from data_pipeline.loader import StepBatches, load_batches
from data_pipeline.manifest import MANIFEST_FILE, Manifest, check_files, read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ShardReader
from data_pipeline.remote import CachedFolder, open_folder
from data_pipeline.storage import LocalFolder
from data_pipeline.vectors import VECTORS_FILE, Vectors, open_vectors
from launcher.run.config import ResolvedRun, RunConfig
from launcher.run.first_stage import backbone_folder


@dataclass(frozen=True, kw_only=True)
class RunData:
    """An opened shard folder and the order of its samples."""

    folder: LocalFolder | CachedFolder
    manifest: Manifest
    plan: Plan
    vectors: Vectors | None = None
    """Of a teacher, for every source of the plan."""

    @property
    def most_negatives(self) -> int:
        """Explicit negatives of one pair at most."""
        return max(self.manifest.sources[name].most_negatives for name in self.plan.source_names)

    @property
    def description(self) -> dict[str, Any]:
        """All that decides what a step trains on, as checkpoints store it: the plan's, and the hashes of the
        vectors."""
        vectors = {"vectors": self.vectors.digests} if self.vectors else {}
        return {**self.plan.description, **vectors}

    def step_batches(self, run: ResolvedRun, processor: ItemProcessor, *, rank: int) -> StepBatches:
        """The rank's batch of any step."""
        config = run.config.data
        return StepBatches(
            plan=self.plan,
            reader=ShardReader(self.folder, self.manifest),
            process=process_of(run.config, processor),
            rank=rank,
            world_size=run.world_size,
            chunking=run.chunking,
            max_bad_in_a_row=config.max_bad_in_a_row,
            with_negatives=config.with_negatives,
            objective=run.config.loss,
            vectors=self.vectors,
            seen_pixels=processor.max_image_pixels,
            fetch_ahead_steps=config.cache.fetch_ahead_steps if isinstance(self.folder, CachedFolder) else 0,
        )

    def batches(
        self, run: ResolvedRun, processor: ItemProcessor, *, rank: int, start_step: int
    ) -> Generator[Batch]:
        """The rank's batches from `start_step` on. Raises DataError when one cannot be made."""
        config = run.config.data
        return load_batches(
            self.step_batches(run, processor, rank=rank),
            start_step=start_step,
            num_steps=run.config.num_steps,
            num_workers=config.num_workers,
            stalled_after_s=config.stalled_after_s,
        )


def open_data(config: RunConfig) -> RunData:
    """Read the manifest, make the plan and open the vectors; writes nothing. Raises DataError, StorageError
    or ConfigError."""
    folder = open_folder(config.data.shards, config.data.cache)
    manifest = read_manifest(folder)
    mixture = Mixture(
        weights=config.data.weights, caps=config.data.caps, sub_batch_size=config.data.sub_batch_size
    )
    config.loss.check(list(manifest.sources))
    plan = Plan(manifest, mixture, seed=config.seed, global_batch_size=config.batch.global_batch_size)
    vectors = _open_vectors(config, manifest, plan)
    return RunData(folder=folder, manifest=manifest, plan=plan, vectors=vectors)


def _open_vectors(config: RunConfig, manifest: Manifest, plan: Plan) -> Vectors | None:
    if config.data.vectors is None:
        if config.loss.needs_vectors:
            raise ConfigError(
                f"objective={config.objective} learns from a teacher's vectors, and data.vectors is not "
                "given; make them with launcher/embed.py and name their folder (--data.vectors DIR)"
            )
        return None
    return open_vectors(Path(config.data.vectors), manifest, sources=plan.source_names)


def build_processor(config: RunConfig) -> ItemProcessor:
    """The processor of the backbone folder with the run's prompts and limits. Raises ConfigError for a folder
    that is no backbone, or has an adapter beside it, and for texts alone where the objective pools images."""
    folder = backbone_folder(config.backbone.path)
    check_backbone_folder(folder)
    if config.backbone.text_only and config.loss.image_cells is not None:
        raise ConfigError(
            f"backbone.text_only=true, but objective={config.objective} learns from images; set it false, or "
            "train texts alone with another objective"
        )
    return ItemProcessor.from_folder(
        folder, prompts=config.prompts.of_model, limits=config.processor, cells=config.loss.image_cells
    )


def process_of(config: RunConfig, processor: ItemProcessor) -> ProcessItems:
    """What makes the chunks of this run: for texts alone without any image."""
    return TextsAlone(processor) if config.backbone.text_only else processor


def check_shards_together(data: RunData, *, hashes: bool) -> None:
    """Do all ranks see the same data, is each local shard and index the manifest's, and are the vectors as
    they were written? Collective.

    The ranks that see one copy share the work; each copy, as on disks of the nodes, is read whole. Rank 0
    shows a progress bar when it takes long. Remote shards are compared when they are fetched, vectors only
    where `hashes` are. Raises the same DataError, with all findings, on every rank.
    """
    location = data.folder.location
    plans = gather_objects(json.dumps(data.description, sort_keys=True))
    if different := [index for index, plan in enumerate(plans) if plan != plans[0]]:
        raise DataError(
            f"{location}: {len(different)} ranks see other shards{' or vectors' * bool(data.vectors)} there "
            f"than rank 0: {', '.join(map(str, different))}; copy the same prepared folder to every machine"
        ).shared()
    if (vectors := data.vectors) and hashes:

        def check_vectors(part: int, num_parts: int) -> list[str]:
            return vectors.problems(part=part, num_parts=num_parts, shows_progress=rank() == 0)

        if problems := _problems_of_copies(vectors.folder / VECTORS_FILE, check_vectors):
            raise DataError("\n".join(problems)).shared()
    folder = data.folder
    if not isinstance(folder, LocalFolder):
        return

    def check_shards(part: int, num_parts: int) -> list[str]:
        return check_files(
            folder,
            data.manifest,
            part=part,
            num_parts=num_parts,
            hashes=hashes,
            shows_progress=rank() == 0,
        )

    problems = _problems_of_copies(folder.path / MANIFEST_FILE, check_shards)
    if problems:
        what = f"{location}: {len(problems)} files are not those of the manifest"
        raise DataError(listed(what, problems, see_all=f"launcher/verify.py {location}")).shared()


def _problems_of_copies(marker: Path, check: Callable[[int, int], list[str]]) -> list[str]:
    """What `check(part, num_parts)` finds in every copy of a folder; of each copy the ranks that see it check
    the parts. Collective. marker: a file of the folder."""
    status = marker.stat()
    # equal for one file; no copying preserves the second
    copies = gather_objects((status.st_ino, status.st_ctime_ns))
    own_copy = [index for index, copy in enumerate(copies) if copy == copies[rank()]]
    own = check(own_copy.index(rank()), len(own_copy))
    if len(own_copy) < len(copies):
        own = [f"{socket.gethostname()}: {problem}" for problem in own]
    return list(dict.fromkeys(problem for problems in gather_objects(own) for problem in problems))
