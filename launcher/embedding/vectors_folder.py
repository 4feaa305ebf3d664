"""All vectors of a corpus, made once by `launcher/embed.py MODEL INPUT OUT` and read in place.

<vectors>/vectors.npy    (N, M, D) float16 or float32 unit vectors, memory-mapped; index 0 is the global one
          items.jsonl    what each of them is, in the order of the rows: {"id": text, "text": text or null,
                         "image": path below the input's folder, or absolute, or null}; an image inside of a
                         shard has the name `SOURCE/SHARD.tar:MEMBER`, which is no file
          rejected.jsonl items of the input that have no vector: {"item": its place in the input, "id",
                         "reason"}
          vectors.json   whose vectors these are (`Description`); written last: what has it is complete
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agff.embedder import Embedder
from agff.errors import ConfigError, DataError
from agff.files import changed_files, write_text
from agff.similarity import FusionConfig

VECTORS_FILE, ITEMS_FILE, REJECTED_FILE = "vectors.npy", "items.jsonl", "rejected.jsonl"
DESCRIPTION_FILE = "vectors.json"
FORMAT = 1
DTYPES = ("float16", "float32")
_REMEDY = "make them again with launcher/embed.py"


@dataclass(frozen=True, kw_only=True)
class Description:
    """Contents of vectors.json."""

    format: int = FORMAT
    model: str
    """Folder of the release or run, as it was named."""
    weights_sha256: str
    settings: Mapping[str, Any]
    """What decides a vector beside the weights (`settings_of`), how many items share a batch, and a hash of
    tokenizer and image processor."""
    fusion: Mapping[str, float]
    input: str
    """Absolute path, or URL."""
    input_fingerprint: str
    num_items: int
    """N."""
    num_vectors: int
    """M, the global one and the fine ones."""
    dim: int
    """D."""
    dtype: str
    num_rejected: int
    num_cut: int
    """Items whose text is longer than the model reads."""
    files: Mapping[str, str]
    """Size and SHA-256 of each file by its name."""


@dataclass(frozen=True, kw_only=True)
class VectorItem:
    """What a row is."""

    id: str
    text: str | None
    image: str | None


class VectorsFolder:
    """The memory-mapped vectors of a corpus: pages are read when they are looked at."""

    def __init__(self, folder: Path, *, check_hashes: bool = False) -> None:
        """check_hashes: compare the files' SHA-256 too, which reads them.

        Raises DataError when there are none, they are not complete, of another format, cut or changed.
        """
        self.folder = folder
        self.description = _read_description(folder)
        most = None if check_hashes else 0
        if problems := changed_files(folder, self.description.files, max_hashed_bytes=most):
            raise DataError("\n".join([*problems, f"{folder}: not as it was written; {_REMEDY}"]))
        self.vectors: NDArray = _mapped(folder / VECTORS_FILE, self.description)
        self._content: NDArray[np.uint8] = np.memmap(folder / ITEMS_FILE, mode="r")
        self._ends = _ends_of_lines(self._content)
        if len(self._ends) != len(self):
            raise DataError(
                f"{folder / ITEMS_FILE}: {len(self._ends):,} lines, {DESCRIPTION_FILE} says {len(self):,}; "
                f"{_REMEDY}"
            )

    def __len__(self) -> int:
        """N."""
        return self.description.num_items

    @property
    def fusion(self) -> FusionConfig:
        """Of the model that made them."""
        return FusionConfig(**self.description.fusion)

    def item(self, row: int) -> VectorItem:
        """What row 0 .. N - 1 is. Raises DataError for a line that is none."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = int(self._ends[row - 1]) + 1 if row else 0
        try:
            item = VectorItem(**json.loads(self._content[start : int(self._ends[row])].tobytes()))
            if not isinstance(item.id, str) or not isinstance(item.text, str | None):
                raise TypeError("id and text must be texts")
            if not isinstance(item.image, str | None):
                raise TypeError("image must be a text")
            return item
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.folder / ITEMS_FILE}: line {row + 1}: not an item: {error}; {_REMEDY}"
            ) from None

    def image_file(self, item: VectorItem) -> Path | None:
        """Where the image is; None for an item without one, for one inside of a shard, and for a file that is
        not there."""
        if item.image is None:
            return None
        source, relative = Path(self.description.input), Path(item.image)
        path = (source if source.is_dir() else source.parent) / relative
        try:
            return path if path.is_file() and ".." not in relative.parts else None
        except OSError:  # such as a name that is too long
            return None

    def check_model(self, embedder: Embedder, *, name: Path) -> None:
        """Raise ConfigError for another model than the one that made the vectors."""
        found, settings = self.description, settings_of(embedder)
        changed = [key for key, value in settings.items() if found.settings.get(key) != value]
        if embedder.weights_sha256 != found.weights_sha256:
            changed.insert(0, "weights")
        if asdict(embedder.fusion) != dict(found.fusion):
            changed.append("fusion")
        if changed:
            raise ConfigError(
                f"{self.folder}: the vectors were made by {found.model}, and {name} has other "
                f"{', '.join(changed)}; name that model, or make the vectors of this one with "
                "launcher/embed.py"
            )


def settings_of(embedder: Embedder) -> dict[str, Any]:
    """What decides a vector beside the weights: prompts, limits of the processor, texts, number format."""
    return {
        "prompts": asdict(embedder.processor.prompts),
        "processor": asdict(embedder.processor.limits),
        "texts": asdict(embedder.texts),
        "weights_dtype": str(embedder.model.prompted_embedding.vectors.dtype).removeprefix("torch."),
    }


def write_description(folder: Path, description: Description) -> None:
    """Write vectors.json, the last file of the folder."""
    write_text(folder / DESCRIPTION_FILE, json.dumps(asdict(description), indent=1) + "\n")


def _read_description(folder: Path) -> Description:
    path = folder / DESCRIPTION_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(
                f"{path}: format {values['format']} is not {FORMAT}, which this version reads; {_REMEDY}"
            )
        names = {field.name for field in dataclasses.fields(Description)}
        if "sources" in values:
            raise DataError(
                f"{folder}: a teacher's vectors of shards, of no use here; make those of items with "
                "launcher/embed.py --all_vectors"
            )
        if names != values.keys():
            raise ValueError(f"its keys must be {', '.join(sorted(names))}")
        description = Description(**values)
        FusionConfig(**description.fusion)
    except FileNotFoundError:
        what = "no vectors here, or they are not complete" if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder}: {what} ({DESCRIPTION_FILE} is missing); launcher/embed.py MODEL INPUT OUT makes or "
            "continues them"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; {_REMEDY}") from None
    counts = (description.num_items, description.num_vectors, description.dim)
    if (
        not _are_fingerprints(description.files)
        or description.dtype not in DTYPES
        or any(type(count) is not int or count < 1 for count in counts)
    ):
        raise DataError(
            f"{path}: num_items, num_vectors, dim {counts}, dtype {description.dtype}, files "
            f"{json.dumps(description.files)}: not those of vectors; {_REMEDY}"
        )
    return description


def _are_fingerprints(files: object) -> bool:
    """Of the files that belong to vectors, and of no others."""
    names = {VECTORS_FILE, ITEMS_FILE, REJECTED_FILE}
    return isinstance(files, dict) and files.keys() == names and all(type(x) is str for x in files.values())


def _mapped(path: Path, description: Description) -> NDArray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}; {_REMEDY}") from None
    expected = (description.num_items, description.num_vectors, description.dim)
    if array.shape != expected or array.dtype != np.dtype(description.dtype):
        raise DataError(
            f"{path}: holds {array.shape} {array.dtype}, it must be {expected} {description.dtype}; {_REMEDY}"
        )
    return array


def _ends_of_lines(content: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Places of the line breaks, looked for block by block: a mask of the whole file would be as large as
    it."""
    size = 2**24
    ends = [
        np.flatnonzero(content[start : start + size] == ord("\n")) + start
        for start in range(0, len(content), size)
    ]
    return np.concatenate(ends)
