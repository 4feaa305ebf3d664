"""Writing a folder of vectors (data_pipeline/vectors.py) block by block, from any number of processes.

See data_pipeline/work_blocks.py: a block is always the same samples, whoever encodes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agff.errors import ConfigError, DataError
from agff.files import partial_path, publish, sha256_of
from data_pipeline.manifest import Manifest
from data_pipeline.vectors import (
    BLOCK,
    FORMAT,
    SIDES,
    VECTORS_FILE,
    VectorFile,
    first_not_finite,
    not_finite,
)
from data_pipeline.work_blocks import WorkBlocks


@dataclass(frozen=True, kw_only=True)
class Block:
    """Samples start .. stop - 1 of a source: the unit of work."""

    source: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.source}-{self.start:09d}"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What the teacher could not take, or not whole."""

    unusable: tuple[str, ...] = ()
    """A line for each sample or side whose vectors are zero."""
    num_cut: int = 0
    """Sides whose text is longer than the teacher reads."""


class VectorsWriter:
    """Writes a folder of vectors, continued after a kill. Every process writes blocks, then one finishes."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        model: str,
        dim: int,
        batch_size: int,
        sources: Sequence[str] | None = None,
    ) -> None:
        """model: identity of the teacher, another text for other vectors. dim: E. batch_size: of the teacher,
        which decides the last bits. sources: None for all; one without samples, or whose samples are images
        with regions, is left out.

        Raises ConfigError when the folder holds other vectors, OSError when it cannot be written.
        """
        chosen = {name: manifest.sources[name] for name in sorted(sources or manifest.sources)}
        self._samples = {
            name: source.num_samples
            for name, source in chosen.items()
            if source.num_samples and not source.num_regions
        }
        self.folder, self.dim = folder, dim
        self._settings: dict[str, Any] = {
            "format": FORMAT,
            "model": model,
            "dim": dim,
            "batch_size": batch_size,
            "sources": {
                name: {"shards": chosen[name].fingerprint, "samples": count, "sides": SIDES}
                for name, count in self._samples.items()
            },
        }
        self._work = WorkBlocks(folder, settings_file=VECTORS_FILE)
        self._refuse_foreign_files()
        self._work.begin(self._settings, what="vectors", same_part=_without_hashes)

    def missing_blocks(self, *, rank: int, world_size: int) -> list[Block]:
        """What the rank has to write: of every `world_size`-th block those that are not on disk."""
        own = {block.name: block for block in self._blocks()[rank::world_size]}
        return [own[name] for name in self._work.missing(list(own))]

    def _blocks(self) -> list[Block]:
        return [
            Block(source=name, start=start, stop=min(start + BLOCK, count))
            for name, count in self._samples.items()
            for start in range(0, count, BLOCK)
        ]

    def write(self, block: Block, vectors_N2E: NDArray[np.floating], left_out: LeftOut = LeftOut()) -> None:
        """Put a block on disk, as float16. left_out: of its samples.

        Raises DataError for a value that is not finite in it, ValueError for another shape.
        """
        expected = (block.stop - block.start, SIDES, self.dim)
        if vectors_N2E.shape != expected:
            raise ValueError(f"vectors of shape {vectors_N2E.shape}, expected {expected}")
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            values = np.ascontiguousarray(vectors_N2E, dtype="<f2")
        if (sample := first_not_finite(values)) is not None:
            raise DataError(not_finite(self._path(block.source), block.start + sample))
        self._work.write(block.name, asdict(left_out), values.tobytes())

    def finish(self) -> LeftOut:
        """Join the blocks and write vectors.json, when every rank has written its own; what was left out of
        all. One process calls it.

        Raises DataError when blocks are missing. Vectors that were finished before left out what was said
        then.
        """
        if missing := self.missing_blocks(rank=0, world_size=1):
            first = missing[0]
            raise DataError(
                f"{self.folder}: {len(missing)} blocks are not written, the first of them samples "
                f"{first.start:,} to {first.stop - 1:,} of {first.source}; give the same command again to "
                "continue"
            )
        found = LeftOut()
        if not self._work.is_finished:
            notes = [self._work.note(block.name) for block in self._blocks()]
            found = LeftOut(
                unusable=tuple(line for note in notes for line in note["unusable"]),
                num_cut=sum(note["num_cut"] for note in notes),
            )
            files = {name: asdict(self._join(name)) for name in self._samples}
            self._work.finish({**self._settings, "sources": files})
        self._work.clean_up()
        return found

    def _join(self, source: str) -> VectorFile:
        path, count = self._path(source), self._samples[source]
        partial = partial_path(path)
        with partial.open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, SIDES, self.dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in self._blocks():
                if block.source == source:
                    file.write(self._work.content(block.name))
        publish(partial, path)
        described = self._settings["sources"][source]
        return VectorFile(**described, size_bytes=path.stat().st_size, sha256=sha256_of(path))

    def _path(self, source: str) -> Path:
        return self.folder / f"{source}.npy"

    def _refuse_foreign_files(self) -> None:
        """Refuse a folder that has vectors of somebody else. Raises ConfigError."""
        foreign = [name for name in self._samples if self._path(name).exists()]
        if foreign and not self._work.is_begun:
            raise ConfigError(
                f"{self._path(foreign[0])} exists and {VECTORS_FILE} does not; choose another folder"
            )


def _without_hashes(values: dict[str, Any]) -> dict[str, Any]:
    """Of vectors.json what is known before the vectors are."""
    for file in values["sources"].values():
        file.pop("size_bytes", None), file.pop("sha256", None)
    return values
