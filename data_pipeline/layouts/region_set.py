"""Images with regions that somebody described -> region sets, for retrieval of regions by their phrases.

A set's folder holds `*.parquet` with the columns `image` (a path, or Hugging Face's struct {bytes, path}) and
`regions` (a list of {box, phrase}), or `*.json` with a list of {image, regions}. A box is x0, y0, x1, y1 in
pixels of its image. Paths are looked for in the folder's images/ and in the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from data_pipeline.layouts.columns import image_cell, refuse_columns_twice
from data_pipeline.layouts.eval_items import EmbeddedImage, ItemTable, UniqueItems, refuse_all
from data_pipeline.layouts.json_rows import read_json
from data_pipeline.layouts.training_rows import is_number

Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image."""

_EXPECTED = "*.parquet with the columns image and regions, or *.json with a list of {image, regions}"


@dataclass(frozen=True, kw_only=True)
class RegionSet(ItemTable):
    """Regions, each once, and the phrases that describe them."""

    regions: tuple[tuple[int, Box], ...]
    """(image, box)."""
    phrases: tuple[tuple[int, int], ...]
    """(text, index of its region), as the tables have them."""
    num_regions_left_out: int = 0
    num_phrases_left_out: int = 0
    """Of those that differ, as they are asked."""
    note: str | None = None

    @property
    def used(self) -> tuple[int, ...]:
        """Images and phrases, in order."""
        images = {image for image, _ in self.regions}
        return tuple(sorted(images | {text for text, _ in self.phrases}))

    def without(self, gone: Collection[int]) -> RegionSet:
        """The set as it is scored when these items cannot be used: a region is left out with its image, and
        where none of its phrases remains. Nothing remains of fewer than two regions."""
        phrases = [
            (text, region)
            for text, region in self.phrases
            if text not in gone and self.regions[region][0] not in gone
        ]
        kept = sorted({region for _, region in phrases})
        if len(kept) < 2:
            phrases, kept = [], []
        num_phrases = len({text for text, _ in self.phrases}) - len({text for text, _ in phrases})
        number = {region: position for position, region in enumerate(kept)}
        return replace(
            self,
            regions=tuple(self.regions[region] for region in kept),
            phrases=tuple((text, number[region]) for text, region in phrases),
            num_regions_left_out=self.num_regions_left_out + len(self.regions) - len(kept),
            num_phrases_left_out=self.num_phrases_left_out + num_phrases,
        )

    def misfit(self, item: int, size: tuple[int, int]) -> str | None:
        """The first box of an image that is not within its size."""
        width, height = size
        return next(
            (
                f"{self.items[item].name}: box {list(box)} is not inside of the image of {width} x {height} "
                "pixels; boxes are x0, y0, x1, y1 in pixels of the image as it is stored upright"
                for image, box in self.regions
                if image == item
                and not (box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height)
            ),
            None,
        )


def find_region_sets(root: Path) -> list[Path]:
    """The folders of region sets: `root` itself, else those in it. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (--regions)")
    folders = (
        [root]
        if _tables(root)
        else sorted(path for path in root.iterdir() if path.is_dir() and _tables(path))
    )
    if not folders:
        raise DataError(f"{root}: holds no region set: {_EXPECTED} (--regions)")
    return folders


def read_region_set(folder: Path) -> RegionSet:
    """One set. No image has been opened; missing ones are among the `findings`.

    Raises DataError with the address of each region that is wrong in itself.
    """
    items = UniqueItems((folder / "images", folder))
    numbers: dict[tuple[int, Box], int] = {}
    phrases: list[tuple[int, int]] = []
    findings = []
    for address, image, entries in _rows(folder):
        image_item = items.add("image", None, MMEB_TEXTS.image_alone, image, address)
        for number, entry in enumerate(entries):
            try:
                box, phrase = _region(entry)
            except DataError as error:
                findings.append(f"{address}: region {number}: {error}")
                continue
            region = numbers.setdefault((image_item, box), len(numbers))
            phrases.append((items.add("phrase", None, phrase, None, address), region))
    refuse_all(findings, remedy="")
    if len(numbers) < 2:
        raise DataError(f"{folder}: {len(numbers)} regions; retrieval needs at least two")
    return RegionSet(
        name=folder.name,
        items=items.items,
        addresses=items.addresses,
        findings=items.findings,
        regions=tuple(numbers),
        phrases=tuple(phrases),
    )


def _tables(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("*.json")])


def _rows(folder: Path) -> Iterator[tuple[str, str | EmbeddedImage, list[Any]]]:
    """(address, image, regions) of each row of all tables."""
    for path in _tables(folder):
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        for number, row in enumerate(rows):
            address = f"{folder.name}/{path.name}:row {number}"
            try:
                image, regions = image_cell(row["image"]), row["regions"]
                is_bytes = isinstance(image, EmbeddedImage) and isinstance(image.content, bytes)
                if not image or not (is_bytes or isinstance(image, str)) or not isinstance(regions, list):
                    raise TypeError("image must be a path or {bytes, path}, regions a list")
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"{address}: expected {{image, regions}}, found {row!r:.80} ({error!r})"
                ) from None
            yield address, image, regions


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as table:
            if missing := {"image", "regions"} - set(table.schema_arrow.names):
                raise DataError(f"{path}: missing columns {', '.join(sorted(missing))}; expected {_EXPECTED}")
            refuse_columns_twice(path, table.schema_arrow.names, ("image", "regions"))
            for batch in table.iter_batches(batch_size=64, columns=["image", "regions"]):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _json_rows(path: Path) -> Iterator[Any]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of {{image, regions}}, found {content!r:.60}")
    return iter(content)


def _region(entry: Any) -> tuple[Box, str]:
    """(box, phrase). Raises DataError without an address."""
    if not isinstance(entry, dict) or not {"box", "phrase"} <= entry.keys():
        raise DataError(f"expected {{box, phrase}}, found {entry!r:.80}")
    box, phrase = entry["box"], entry["phrase"]
    if not isinstance(phrase, str) or not phrase.strip():
        raise DataError(f"phrase must be a text, found {phrase!r:.80}")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_number, box)):
        raise DataError(f"box must be four numbers x0, y0, x1, y1, found {box!r:.80}")
    x0, y0, x1, y1 = map(float, box)
    if not (x0 < x1 and y0 < y1):
        raise DataError(f"box {box} has no area: x0 < x1 and y0 < y1 must hold (not x, y, width, height)")
    return (x0, y0, x1, y1), phrase
