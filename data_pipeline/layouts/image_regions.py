"""Images with regions and what is said of each, in four layouts.

FILE.json, .jsonl, .parquet   rows {"image": path, "regions": [{"box": [x0, y0, x1, y1], "phrase"}, ...]} and,
                              where it is known, "width", "height": of the image that the boxes are of; a
                              table's image may be Hugging Face's struct {bytes, path}
region_descriptions.json      Visual Genome: [{"id", "regions": [{"x", "y", "width", "height", "phrase"},
                              ...]}, ...]; images <id>.jpg, also below VG_100K and VG_100K_2
refs(unc).p, .json, .parquet  RefCOCO (data_pipeline/layouts/refcoco.py), with instances.json beside it

Boxes are in pixels of the upright image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from agff.errors import DataError
from data_pipeline.layouts.columns import image_cell, open_table, refuse_columns_twice, rows_between
from data_pipeline.layouts.eval_items import EmbeddedImage
from data_pipeline.layouts.json_rows import json_rows
from data_pipeline.layouts.refcoco import INSTANCES_FILE, refcoco_rows
from data_pipeline.layouts.training_rows import RegionRow, below, region

Kind = Literal["regions", "visual_genome", "refcoco"]
_IMAGE_FIELDS = {"bytes", "path"}
_COLUMNS = ("image", "id", "regions", "width", "height")
_GENOME_FOLDERS = ("", "VG_100K", "VG_100K_2")


@dataclass(frozen=True, kw_only=True)
class ImageRegions:
    """One source; a row is an image with its regions."""

    root: Path
    """The file."""
    images: Path
    """Folder of the images."""
    name: str
    split: str = "train"
    """Of RefCOCO's references those that are read."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """See Layout."""
        return {"layout": "regions", "images": os.path.relpath(self.images, self.root.parent)}

    def sources(self) -> list[str]:
        """See Layout."""
        return [self.name]

    def count_rows(self, source: str) -> int:
        """See Layout."""
        if self.kind == "refcoco":
            count = len(refcoco_rows(self.root, self.images, self.split))
        elif self.root.suffix == ".parquet":
            with open_table(self.root) as table:
                count = table.metadata.num_rows
                refuse_columns_twice(self.root, table.schema_arrow.names, _COLUMNS)
        else:
            count = json_rows(self.root).num_rows
        if not count:
            raise DataError(f"{self.root}: no rows{f' of split {self.split}' * (self.kind == 'refcoco')}")
        return count

    def rows(self, source: str, *, start: int, stop: int) -> Iterator[RegionRow | str]:
        """See Layout."""
        if self.kind == "refcoco":
            yield from refcoco_rows(self.root, self.images, self.split)[start:stop]
            return
        if self.root.suffix == ".parquet":
            rows = rows_between([self.root], _columns, start=start, stop=stop)
        else:
            rows = json_rows(self.root).between(start, stop)
        make = self._of_genome if self.kind == "visual_genome" else self._row
        for row in rows:
            try:
                yield make(row)
            except DataError as error:
                yield str(error)

    def tables(self, source: str) -> list[Path]:
        """See Layout."""
        return [self.root, *([self.root.parent / INSTANCES_FILE] if self.kind == "refcoco" else [])]

    @property
    def kind(self) -> Kind:
        """By the names of the first row's fields. Raises DataError for other ones."""
        if self.root.suffix in (".p", ".pkl", ".pickle"):
            return "refcoco"
        names = self._field_names()
        if {"ann_id", "image_id", "sentences"} <= names:
            return "refcoco"
        if {"image", "regions"} <= names:
            return "regions"
        if {"id", "regions"} <= names:
            return "visual_genome"
        raise DataError(
            f"{self.root}: a row must have image and regions, as Visual Genome's id and regions, or as "
            f"RefCOCO's ann_id, image_id and sentences; found {', '.join(sorted(names)) or 'nothing'}"
        )

    def _field_names(self) -> set[str]:
        if self.root.suffix != ".parquet":
            return {name for row in json_rows(self.root).between(0, 1) for name in row}
        try:
            with open_table(self.root) as table:
                return set(table.schema_arrow.names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.root}: cannot read the parquet file: {error}; download it again"
            ) from None

    def _row(self, row: Mapping[str, Any]) -> RegionRow:
        cell, width, height = _of(row, "image", "width", "height")
        image = image_cell(cell) if not isinstance(cell, Mapping) or cell.keys() >= _IMAGE_FIELDS else None
        is_bytes = isinstance(image, EmbeddedImage) and isinstance(image.content, bytes)
        if not image or not (is_bytes or isinstance(image, str)):
            raise DataError(f"image {cell!r:.60} must be a path or {{bytes, path}}")
        found = []
        for number, each in enumerate(_listed(row)):
            box, phrase = _of(each, "box", "phrase")
            found.append(region(box, phrase, f"region {number}"))
        is_known = (width, height) != (None, None)
        if is_known and not (isinstance(width, int) and isinstance(height, int)):
            raise DataError(f"width {width!r:.20} and height {height!r:.20} must be whole numbers of pixels")
        found_image = below(self.images, image, "image") if isinstance(image, str) else image
        return RegionRow(image=found_image, regions=tuple(found), size=(width, height) if is_known else None)

    def _of_genome(self, row: Mapping[str, Any]) -> RegionRow:
        number = row.get("id")
        if type(number) is not int or not 0 <= number < 2**63:  # longer ones are no name of a file
            raise DataError(f"id {number!r:.60} must be the number of an image")
        paths = [self.images / folder / f"{number}.jpg" for folder in _GENOME_FOLDERS]
        found = []
        for place, each in enumerate(_listed(row)):
            x, y, width, height, phrase = _of(each, "x", "y", "width", "height", "phrase")
            try:
                box: Any = [x, y, x + width, y + height]
            except TypeError:
                box = [x, y, width, height]
            found.append(region(box, phrase, f"region {_of(each, 'region_id')[0] or place}"))
        image = next((path for path in paths if path.is_file()), paths[0])
        return RegionRow(image=image, regions=tuple(found))


def _columns(found: list[str]) -> list[str]:
    return [name for name in found if name in _COLUMNS]


def _listed(row: Mapping[str, Any]) -> list[Any]:
    regions = row.get("regions")
    if not isinstance(regions, list) or not regions:
        raise DataError(f"regions {regions!r:.60} must be a list with at least one region")
    return regions


def _of(each: Any, *names: str) -> list[Any]:
    return [each.get(name) if isinstance(each, Mapping) else None for name in names]
