"""MMEB-train's layout: parquet rows and loose image files -> pairs, each with its reason when it cannot be used.

<root>/<SUBSET>/original-00000-of-00001.parquet    qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path
<root>/images/<SUBSET>/Train/<file>                named by those columns, relative to the root ("" when absent)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq

from agff.batch import IMAGE_PLACEHOLDER
from agff.errors import DataError

REQUIRED = ("qry", "qry_image_path", "pos_text", "pos_image_path")
OPTIONAL = ("neg_text", "neg_image_path")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a pair: text, image or both, as the subset wrote it."""

    text: str
    image: Path | None
    """The file, below the MMEB root."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One training row."""

    query: Side
    target: Side
    negative: Side | None
    """An explicit hard negative, where the subset has them."""


def find_subsets(root: Path, *, split: str) -> list[str]:
    """Names of the folders that hold a parquet of this split. Raises DataError when there is none."""
    names = sorted({path.parent.name for path in root.glob(f"*/{split}-*.parquet")})
    if not names:
        raise DataError(f"{root}: no <SUBSET>/{split}-*.parquet here; give the folder of an MMEB-train download")
    return names


def parquet_files(root: Path, subset: str, *, split: str) -> list[Path]:
    """The subset's parquet files in order."""
    return sorted((root / subset).glob(f"{split}-*.parquet"))


def count_rows(root: Path, subset: str, *, split: str) -> int:
    """Rows of a subset, from the files' footers. Raises DataError for a file without the required columns."""
    total = 0
    for path in parquet_files(root, subset, split=split):
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot read the parquet file: {error}") from None
        if missing := [name for name in REQUIRED if name not in file.schema_arrow.names]:
            raise DataError(
                f"{path}: columns {', '.join(missing)} are missing; MMEB-train has {', '.join((*REQUIRED, *OPTIONAL))}"
            )
        total += file.metadata.num_rows
    return total


def read_pairs(root: Path, subset: str, *, split: str, start: int, stop: int) -> Iterator[Pair | str]:
    """Rows start .. stop - 1 of a subset: a Pair, or the reason why the row cannot be used."""
    for values in _rows(root, subset, split=split, start=start, stop=stop):
        try:
            yield _pair(root, values)
        except DataError as error:
            yield str(error)


def _rows(root: Path, subset: str, *, split: str, start: int, stop: int) -> Iterator[dict[str, str]]:
    position = 0
    for path in parquet_files(root, subset, split=split):
        file = pq.ParquetFile(path)
        columns = [name for name in (*REQUIRED, *OPTIONAL) if name in file.schema_arrow.names]
        if position + file.metadata.num_rows <= start:
            position += file.metadata.num_rows
            continue
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            if position >= stop:
                return
            first, last = max(start - position, 0), min(stop - position, batch.num_rows)
            if first < last:
                yield from batch.slice(first, last - first).to_pylist()
            position += batch.num_rows


def _pair(root: Path, values: dict[str, str]) -> Pair:
    negative = None
    if values.get("neg_text") or values.get("neg_image_path"):
        negative = _side(root, values.get("neg_text"), values.get("neg_image_path"), "neg")
    return Pair(
        query=_side(root, values["qry"], values["qry_image_path"], "qry"),
        target=_side(root, values["pos_text"], values["pos_image_path"], "pos"),
        negative=negative,
    )


def _side(root: Path, text: str | None, image_path: str | None, column: str) -> Side:
    text = text or ""
    if not image_path:
        # WebQA's queries carry a placeholder though the row has no image
        stripped = text.replace(IMAGE_PLACEHOLDER, "").strip("\n") if IMAGE_PLACEHOLDER in text else text
        if not stripped.strip():
            raise DataError(f"{column}: neither text nor image")
        return Side(text=stripped, image=None)
    if (found := text.count(IMAGE_PLACEHOLDER)) != 1:
        raise DataError(f"{column}: {IMAGE_PLACEHOLDER} stands {found} times in the text of an image, it must stand once")
    relative = PurePosixPath(image_path)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{column}: image path {image_path!r} leaves the MMEB folder")
    return Side(text=text, image=root / relative)
