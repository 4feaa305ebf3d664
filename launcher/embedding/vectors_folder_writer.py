"""Writing a folder of vectors (launcher/embedding/vectors_folder.py) block by block, from any number of
processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agff.errors import ConfigError, DataError
from agff.files import file_fingerprint, partial_path, publish
from data_pipeline.corpora.corpus import Unusable
from data_pipeline.work_blocks import BLOCKS_FOLDER, WorkBlocks
from launcher.embedding.taken_folder import CLAIM_FILE
from launcher.embedding.vectors_folder import (
    DESCRIPTION_FILE,
    ITEMS_FILE,
    REJECTED_FILE,
    VECTORS_FILE,
    Description,
    VectorItem,
    VectorsFolder,
)

BLOCK = 512
"""Items of a block: the unit of work."""
_IDENTITY = (
    "format",
    "weights_sha256",
    "settings",
    "fusion",
    "input_fingerprint",
    "num_vectors",
    "dim",
    "dtype",
)
"""Keys of vectors.json in which a work that is continued must agree. Names of folders may change."""


@dataclass(frozen=True, kw_only=True)
class EncodedBlock:
    """What became of the items of a block."""

    vectors_NMD: NDArray[np.float32]
    """Of those that can be used."""
    items: Sequence[VectorItem]
    rejected: Sequence[tuple[int, Unusable]]
    """(place in the input, why)."""
    num_cut: int


class VectorsFolderWriter:
    """Writes a folder of vectors, continued after a kill. Every process writes blocks, then one finishes."""

    def __init__(self, folder: Path, description: Description, *, num_input: int) -> None:
        """description: with zeros in place of what is known at the end. num_input: items, usable or not."""
        self.folder, self._description, self._num_input = folder, description, num_input
        self._work = WorkBlocks(folder, settings_file=DESCRIPTION_FILE)

    def begin(self) -> None:
        """Take the folder. One process calls it, before any writes. Raises ConfigError when it holds
        something else, OSError when it cannot be written."""
        values = json.loads(json.dumps(asdict(self._description)))
        if not self._work.is_begun and self.folder.exists():
            foreign = [path.name for path in self.folder.iterdir() if not _is_of_a_start(path)]
            if foreign:
                raise ConfigError(
                    f"{self.folder} exists and holds no vectors ({DESCRIPTION_FILE} is missing), but "
                    f"{foreign[0]}; choose another folder"
                )
        self._work.begin({key: values[key] for key in _IDENTITY}, what="vectors")

    def missing_blocks(self, *, rank: int, world_size: int) -> list[range]:
        """What the rank has to write: of every `world_size`-th block those that are not on disk."""
        own = {_name(block): block for block in self._blocks()[rank::world_size]}
        return [own[name] for name in self._work.missing(list(own))]

    def write(self, block: range, encoded: EncodedBlock) -> None:
        """Put a block on disk. Raises DataError for a value that is not finite."""
        values = np.ascontiguousarray(encoded.vectors_NMD, dtype=self._dtype)
        expected = (len(encoded.items), self._description.num_vectors, self._description.dim)
        if values.shape != expected:
            raise ValueError(f"vectors of shape {values.shape}, expected {expected}")
        if not np.isfinite(values).all():
            raise DataError(
                f"{self.folder}: items {block.start:,} to {block.stop - 1:,}: the model gives vectors that "
                "are not finite; they would mean nothing"
            )
        note = {
            "items": [asdict(item) for item in encoded.items],
            "rejected": [{"item": place, **asdict(why)} for place, why in encoded.rejected],
            "num_cut": encoded.num_cut,
        }
        self._work.write(_name(block), note, values.tobytes())

    def finish(self) -> Description:
        """Join the blocks and write vectors.json, when every rank has written its own. One process calls it.

        Raises DataError when blocks are missing, or nothing can be used.
        """
        if self._work.is_finished:
            return VectorsFolder(self.folder).description
        num_items = self._write_lines(ITEMS_FILE, "items")
        num_rejected = self._write_lines(REJECTED_FILE, "rejected")
        if not num_items:
            first = json.loads((self.folder / REJECTED_FILE).read_text(encoding="ascii").partition("\n")[0])
            raise DataError(
                f"none of the {num_rejected:,} items can be used, the first because of {first['reason']}; "
                f"fix the input and remove {self.folder}"
            )
        self._join(num_items)
        names = (VECTORS_FILE, ITEMS_FILE, REJECTED_FILE)
        done = replace(
            self._description,
            num_items=num_items,
            num_rejected=num_rejected,
            num_cut=sum(self._work.note(_name(block))["num_cut"] for block in self._blocks()),
            files={name: file_fingerprint(self.folder / name) for name in names},
        )
        self._work.finish(asdict(done))
        return done

    def clean_up(self) -> None:
        """Remove what only unfinished vectors need."""
        self._work.clean_up()

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(self._description.dtype).newbyteorder("<")

    def _blocks(self) -> list[range]:
        return [
            range(start, min(start + BLOCK, self._num_input)) for start in range(0, self._num_input, BLOCK)
        ]

    def _join(self, num_items: int) -> None:
        shape = (num_items, self._description.num_vectors, self._description.dim)
        path = self.folder / VECTORS_FILE
        partial = partial_path(path)
        with partial.open("wb") as file:
            header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in self._blocks():
                file.write(self._work.content(_name(block)))
        publish(partial, path)

    def _write_lines(self, name: str, key: str) -> int:
        """Write the blocks' notes under that key, one after the other; their number."""
        path, count = self.folder / name, 0
        partial = partial_path(path)
        with partial.open("w", encoding="ascii") as file:  # JSON's escapes: names of files may be no UTF-8
            for block in self._blocks():
                rows = self._work.note(_name(block))[key]
                file.writelines(json.dumps(row) + "\n" for row in rows)
                count += len(rows)
        publish(partial, path)
        return count


def _name(block: range) -> str:
    return f"{block.start:012d}"


def _is_of_a_start(path: Path) -> bool:
    """Whether it is of a process that claimed the folder and was killed at once."""
    return path.name in (CLAIM_FILE, BLOCKS_FOLDER) or path.suffix == ".partial"
