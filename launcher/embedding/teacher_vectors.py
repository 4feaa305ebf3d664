"""The work of all ranks: a teacher's vectors of the query and the target of every sample of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.remote import CacheConfig, open_folder
from data_pipeline.vectors import SIDES
from data_pipeline.vectors_writer import LeftOut, VectorsWriter
from launcher.embedding.blocks import refuse_images, write_blocks
from launcher.embedding.inputs import chosen_sources
from launcher.embedding.taken_folder import taken
from launcher.embedding.teacher import Teacher, open_teacher
from launcher.run.meeting import from_first_rank, together
from launcher.run.ranks import RankInfo


@dataclass(frozen=True, kw_only=True)
class TeacherWork:
    """A teacher, loaded, and what it is to embed."""

    reader: ShardReader
    teacher: Teacher
    manifest: Manifest
    sources: Sequence[str]

    def plan(self) -> dict[str, str]:
        """Rows of a table for a person."""
        counts = {name: self.manifest.sources[name].num_samples for name in self.sources}
        size = sum(counts.values()) * SIDES * self.teacher.dim * 2 / 2**20
        return {
            "teacher": self.teacher.identity,
            "sees": "texts alone" if self.teacher.seen_pixels is None else "texts and images",
            "vectors": f"E = {self.teacher.dim:,}; query and target of each sample, float16, {size:,.1f} MiB",
            **{name: f"{count:,} samples" for name, count in counts.items()},
        }


def open_teacher_work(
    model: Path, shards: str, sources: Sequence[str] | None, device: torch.device
) -> TeacherWork:
    """Raises AgffError for what can be known to be wrong before the work."""
    folder = open_folder(shards, CacheConfig())
    manifest = read_manifest(folder)
    chosen, reader = chosen_sources(sources, manifest), ShardReader(folder, manifest)
    teacher = open_teacher(model, device)
    refuse_images(teacher, reader, chosen)
    return TeacherWork(reader=reader, teacher=teacher, manifest=manifest, sources=chosen)


def write_teacher_vectors(work: TeacherWork, out: Path, rank: RankInfo, *, batch_size: int) -> LeftOut:
    """Write this rank's blocks; rank 0 makes files of all. What was left out of all samples. Collective:
    every rank must call it. Raises AgffError on all ranks."""
    with taken(out, rank):

        def write() -> VectorsWriter:
            writer = VectorsWriter(
                out,
                work.manifest,
                model=work.teacher.identity,
                dim=work.teacher.dim,
                batch_size=batch_size,
                sources=work.sources,
            )
            blocks = writer.missing_blocks(rank=rank.rank, world_size=rank.world_size)
            num_samples = sum(block.stop - block.start for block in blocks)
            with tqdm(total=num_samples, desc="embed", unit="sample", disable=rank.rank > 0) as bar:
                write_blocks(
                    work.teacher, work.reader, writer, blocks, batch_size=batch_size, progress=bar.update
                )
            return writer

        writer = together(write)
        return from_first_rank(writer.finish)
