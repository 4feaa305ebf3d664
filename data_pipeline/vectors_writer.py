"""Writing a folder of vectors (data_pipeline/vectors.py) block by block, from any number of processes.

What is done lies in `<vectors>/.blocks` until all is. A block is always the same samples, whoever encodes it,
so the bytes do not depend on the number of ranks or on how often the work was interrupted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agff.errors import ConfigError, DataError
from agff.files import partial_path, publish, sha256_of, write_text
from data_pipeline.manifest import Manifest
from data_pipeline.vectors import (
    BLOCK,
    BLOCKS_FOLDER,
    FORMAT,
    SIDES,
    VECTORS_FILE,
    VectorFile,
    first_not_finite,
    not_finite,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Samples start .. stop - 1 of a source: the unit of work."""

    source: str
    start: int
    stop: int


class VectorsWriter:
    """Writes a folder of vectors, continued after a kill. Every process writes blocks, then one finishes."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, model: str, dim: int, sources: Sequence[str] | None = None
    ) -> None:
        """model: identity of the teacher, another text for other vectors. dim: E. sources: None for all; one
        without samples, or whose samples are images with regions, is left out.

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
            "sources": {
                name: {"shards": chosen[name].fingerprint, "samples": count, "sides": SIDES}
                for name, count in self._samples.items()
            },
        }
        self._check_place()
        if not self.is_finished:
            (folder / BLOCKS_FOLDER).mkdir(parents=True, exist_ok=True)
            write_text(folder / BLOCKS_FOLDER / VECTORS_FILE, json.dumps(self._settings))

    @property
    def is_finished(self) -> bool:
        """Whether vectors.json is there, and with it everything."""
        return (self.folder / VECTORS_FILE).exists()

    def missing_blocks(self, *, rank: int, world_size: int) -> list[Block]:
        """What the rank has to write: of every `world_size`-th block those that are not on disk."""
        if self.is_finished:
            return []
        blocks = [
            Block(source=name, start=start, stop=min(start + BLOCK, count))
            for name, count in self._samples.items()
            for start in range(0, count, BLOCK)
        ]
        return [
            block
            for block in blocks[rank::world_size]
            if not self._block_path(block.source, block.start).exists()
            and not self._path(block.source).exists()
        ]

    def write(self, block: Block, vectors_N2E: NDArray[np.floating]) -> None:
        """Put a block on disk, as float16. Raises DataError for a value that is not finite in it, ValueError
        for another shape."""
        expected = (block.stop - block.start, SIDES, self.dim)
        if vectors_N2E.shape != expected:
            raise ValueError(f"vectors of shape {vectors_N2E.shape}, expected {expected}")
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            values = np.ascontiguousarray(vectors_N2E, dtype="<f2")
        if (sample := first_not_finite(values)) is not None:
            raise DataError(not_finite(self._path(block.source), block.start + sample))
        path = self._block_path(block.source, block.start)
        partial = partial_path(path)
        partial.write_bytes(values.tobytes())
        publish(partial, path)

    def finish(self) -> None:
        """Join the blocks and write vectors.json, when every rank has written its own. One process calls it.

        Raises DataError when blocks are missing.
        """
        if missing := self.missing_blocks(rank=0, world_size=1):
            first = missing[0]
            raise DataError(
                f"{self.folder}: {len(missing)} blocks are not written, the first of them samples "
                f"{first.start:,} to {first.stop - 1:,} of {first.source}; give the same command again to "
                "continue"
            )
        if not self.is_finished:
            files = {name: asdict(self._join(name)) for name in self._samples}
            values = {**self._settings, "sources": files}
            write_text(self.folder / VECTORS_FILE, json.dumps(values, indent=1) + "\n")
        shutil.rmtree(self.folder / BLOCKS_FOLDER, ignore_errors=True)
        for left in self.folder.glob("*.partial"):  # of a process that was killed
            left.unlink(missing_ok=True)

    def _join(self, source: str) -> VectorFile:
        path, count = self._path(source), self._samples[source]
        if not path.exists():
            partial = partial_path(path)
            with partial.open("wb") as file:
                header = {"descr": "<f2", "fortran_order": False, "shape": (count, SIDES, self.dim)}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, count, BLOCK):
                    file.write(self._block_path(source, start).read_bytes())
            publish(partial, path)
        described = self._settings["sources"][source]
        return VectorFile(**described, size_bytes=path.stat().st_size, sha256=sha256_of(path))

    def _path(self, source: str) -> Path:
        return self.folder / f"{source}.npy"

    def _block_path(self, source: str, start: int) -> Path:
        return self.folder / BLOCKS_FOLDER / f"{source}-{start:09d}"

    def _check_place(self) -> None:
        """Refuse a folder that belongs to other vectors. Raises ConfigError."""
        descriptions = (self.folder / VECTORS_FILE, self.folder / BLOCKS_FOLDER / VECTORS_FILE)
        begun = [path for path in descriptions if path.exists()]
        if not begun:
            if foreign := [name for name in self._samples if self._path(name).exists()]:
                raise ConfigError(
                    f"{self._path(foreign[0])} exists and {VECTORS_FILE} does not; choose another folder"
                )
            return
        try:
            found = json.loads(begun[0].read_text(encoding="utf-8"))
            for file in found["sources"].values():
                file.pop("size_bytes", None), file.pop("sha256", None)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(
                f"{begun[0]} is damaged; remove {self.folder}, or choose another folder"
            ) from None
        if changed := [key for key in self._settings if found.get(key) != self._settings[key]]:
            raise ConfigError(
                f"{self.folder} holds vectors with other {', '.join(changed)}; remove it, or choose another "
                "folder"
            )
