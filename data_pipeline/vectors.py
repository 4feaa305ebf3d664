"""Vectors of a teacher, made once for every sample of a folder of shards and read beside them.

<vectors>/vectors.json   {"format": 1, "model": which teacher, "dim": E, "batch_size": of the teacher,
                         "sources": {SOURCE: {"shards": fingerprint of the source
                         (data_pipeline/manifest.py), "samples": N, "sides": 2, "size_bytes", "sha256"}}}
          <SOURCE>.npy   (N, 2, E) float16 in the order of the source's samples: query, target

Vectors mean something beside the shards that they were made for only, so those of other shards are refused.
They are written by data_pipeline/vectors_writer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agff.errors import DataError
from agff.files import hashing_bar, sha256_of
from data_pipeline.manifest import Manifest
from data_pipeline.work_blocks import BLOCKS_FOLDER

VECTORS_FILE = "vectors.json"
FORMAT = 1
SIDES = 2
"""Query and target. An explicit negative has no vector."""
BLOCK = 1024
"""Samples that are read or written at once: 15 MB at E = 3,584."""
_REMEDY = "make them for these shards with launcher/embed.py"


@dataclass(frozen=True, kw_only=True)
class VectorFile:
    """What vectors.json says of one source."""

    shards: str
    """Fingerprint of the source."""
    samples: int
    sides: int
    size_bytes: int
    sha256: str


class Vectors:
    """The memory-mapped vectors of some sources: pages are read when they are looked at."""

    def __init__(self, folder: Path, files: Mapping[str, VectorFile], arrays: Mapping[str, NDArray]) -> None:
        self.folder, self._files, self._arrays = folder, files, arrays

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each source's file, as vectors.json has it."""
        return {name: file.sha256 for name, file in self._files.items()}

    def read(self, source: str, sample: int) -> NDArray[np.float32]:
        """(2, E) vectors of the sample's query and target. Raises DataError where one is not finite."""
        vectors = self._arrays[source][sample].astype(np.float32)
        if not np.isfinite(vectors).all():
            raise DataError(not_finite(_path(self.folder, source), sample))
        return vectors

    def is_absent(self, source: str, sample: int) -> bool:
        """Whether the teacher could not take a side of the sample, which is zeros (launcher/embed.py said
        why)."""
        return not self._arrays[source][sample].any(axis=-1).all()

    def problems(self, *, part: int, num_parts: int, shows_progress: bool) -> list[str]:
        """One line for each of every `num_parts`-th file that is not as it was written or holds what is not
        finite. Reads the files."""
        names = sorted(self._files)[part::num_parts]
        total_bytes = sum(self._files[name].size_bytes for name in names)
        found = []
        with hashing_bar("check vectors", total_bytes, is_shown=shows_progress) as bar:
            for name in names:
                path, expected = _path(self.folder, name), self._files[name].sha256
                if (digest := sha256_of(path, progress=bar.update)) != expected:
                    found.append(
                        f"{path}: SHA-256 is {digest[:12]}..., {VECTORS_FILE} says {expected[:12]}...; "
                        f"{_REMEDY}"
                    )
                elif (sample := first_not_finite(self._arrays[name])) is not None:
                    found.append(not_finite(path, sample))
        return found


def open_vectors(folder: Path, manifest: Manifest, *, sources: Iterable[str]) -> Vectors:
    """The vectors of these sources of the manifest.

    Raises one DataError with every finding: no vectors there, a source without any or with regions, vectors
    of other shards, of another number of samples or width, a file that is missing, cut short or no array of
    float16.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(folder)):  # a Path keeps one slash of "://"
        raise DataError(f"data.vectors={folder}: vectors are read from a local folder only; copy them to one")
    dim, files = _read_description(folder)
    findings, arrays = [], {}
    for name in sources:
        try:
            arrays[name] = _open(folder, name, files.get(name), manifest, dim)
        except DataError as error:
            findings.append(str(error))
    if findings:
        raise DataError("\n".join(findings))
    return Vectors(folder, {name: files[name] for name in arrays}, arrays)


def first_not_finite(array: NDArray) -> int | None:
    """The first sample with a value that is NaN or infinite; None where there is none. Read in blocks."""
    for start in range(0, len(array), BLOCK):
        is_finite = np.isfinite(array[start : start + BLOCK]).all(axis=(1, 2))
        if not is_finite.all():
            return start + int(np.argmin(is_finite))
    return None


def not_finite(path: Path, sample: int) -> str:
    """What to say of vectors that are not finite."""
    return (
        f"{path}: the vectors of sample {sample:,} hold NaN or infinity (float16 ends at 65,504); a "
        "teacher's vectors must be finite: make them again with launcher/embed.py"
    )


def _path(folder: Path, source: str) -> Path:
    return folder / f"{source}.npy"


def _read_description(folder: Path) -> tuple[int, dict[str, VectorFile]]:
    """(E, file of each source). Raises DataError."""
    path = folder / VECTORS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(f"{path}: format {values['format']} is not {FORMAT}; {_REMEDY}")
        return values["dim"], {name: VectorFile(**file) for name, file in values["sources"].items()}
    except FileNotFoundError:
        what = "they are not complete" if (folder / BLOCKS_FOLDER).exists() else "no vectors here"
        raise DataError(f"{folder}: {what} ({VECTORS_FILE} is missing); {_REMEDY}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error!r}; {_REMEDY}") from None


def _open(folder: Path, name: str, file: VectorFile | None, manifest: Manifest, dim: int) -> NDArray:
    path, source = _path(folder, name), manifest.sources[name]
    if source.num_regions:
        raise DataError(
            f"{folder}: {name} has regions, of which each step draws another: a teacher's vectors are of "
            "pairs; leave it out with data.weights"
        )
    if file is None:
        raise DataError(
            f"{folder}: no vectors of source {name}; {_REMEDY}, or leave it out with data.weights"
        )
    if file.samples != source.num_samples:
        raise DataError(
            f"{path}: vectors of {file.samples:,} samples, {name} has {source.num_samples:,}; {_REMEDY}"
        )
    if file.shards != source.fingerprint:
        raise DataError(f"{path}: the vectors were made for other shards of {name}; {_REMEDY}")
    try:
        if (found := path.stat().st_size) != file.size_bytes:
            raise DataError(
                f"{path}: has {found:,} bytes, {VECTORS_FILE} says {file.size_bytes:,}; {_REMEDY}"
            )
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}; {_REMEDY}") from None
    expected = (file.samples, SIDES, dim)
    if array.shape != expected or array.dtype != np.float16 or file.sides != SIDES:
        raise DataError(
            f"{path}: holds {array.shape} {array.dtype}, it must be {expected} float16 (samples, sides, E); "
            f"{_REMEDY}"
        )
    return array
