"""RefCOCO, RefCOCO+ and RefCOCOg as they are published: expressions that name an object of a COCO image.

<folder>/refs(unc).p      or .json, .parquet with the same fields: [{"ref_id", "ann_id", "image_id", "split",
                          "sentences": [{"sent"}, ...]}, ...]
         instances.json   {"images": [{"id", "file_name", "width", "height"}],
                           "annotations": [{"id", "image_id", "bbox": [x, y, width, height]}]}

Training reads references of split `train` only: the others are what models are judged by. The published file
is a pickle, which may run any program when it is read as usual; here it may hold plain values only, and the
first class or function that it asks for ends the reading.
"""

from __future__ import annotations

import functools
import pickle
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from agff.errors import DataError
from data_pipeline.layouts.columns import refuse_columns_twice
from data_pipeline.layouts.json_rows import file_state, read_json
from data_pipeline.layouts.training_rows import Region, RegionRow, below, region

INSTANCES_FILE = "instances.json"
_FIELDS = ("ann_id", "image_id", "split", "sentences")
_NO_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)
"""What Python raises on bytes that are no pickle."""


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, texts and numbers; nothing that has a name."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._path = path

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"{self._path}: the pickle asks for {module}.{name}, which could run any program; it may hold "
            "lists, dicts, texts and numbers only: take a JSON or parquet copy of it"
        )

    def persistent_load(self, pid: object) -> NoReturn:
        raise DataError(f"{self._path}: the pickle refers to {pid!r:.60} outside of itself; it must be whole")


def _read_pickle(path: Path) -> Any:
    """The plain values of a pickle. Raises DataError, before anything was run, for one that holds others."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, path).load()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    except _NO_PICKLE as error:
        raise DataError(f"{path}: not a readable pickle: {error}; download it again") from None


def refcoco_rows(path: Path, images: Path, split: str) -> tuple[RegionRow | str, ...]:
    """One row an image, in the order of its first reference of the split: every sentence of every reference
    is a region. Raises DataError."""
    return _refcoco_rows(path, images, split, (file_state(path), file_state(path.parent / INSTANCES_FILE)))


def refcoco_splits(path: Path) -> list[str]:
    """Those that the references have, in alphabetical order. Raises DataError."""
    return sorted({str(ref["split"]) for ref in _refs(path) if isinstance(ref, Mapping) and "split" in ref})


@functools.lru_cache(maxsize=2)  # a writer converts many parts of it
def _refcoco_rows(path: Path, images: Path, split: str, state: object) -> tuple[RegionRow | str, ...]:
    refs = _refs(path)
    sizes, boxes = _instances(path.parent / INSTANCES_FILE)
    regions: dict[int, list[Region | str]] = {}
    for number, ref in enumerate(refs):
        has_fields = isinstance(ref, Mapping) and all(name in ref for name in _FIELDS)
        if not has_fields or not all(isinstance(ref[name], int) for name in ("ann_id", "image_id")):
            raise DataError(
                f"{path}: reference {number} must have {', '.join(_FIELDS)}; found {reprlib.repr(ref)}"
            )
        if ref["split"] == split:
            regions.setdefault(ref["image_id"], []).extend(_regions_of(ref, number, boxes))
    return tuple(_row(image_id, found, sizes, images) for image_id, found in regions.items())


def _refs(path: Path) -> Sequence[Any]:
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
            refuse_columns_twice(path, table.column_names, table.column_names)
            refs = table.to_pylist()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot read the parquet file: {error}; download it again") from None
    else:
        refs = read_json(path) if path.suffix == ".json" else _read_pickle(path)
    if not isinstance(refs, list):
        raise DataError(f"{path}: must hold a list of references, found {type(refs).__name__}")
    return refs


def _instances(path: Path) -> tuple[dict[int, Mapping[str, Any]], dict[int, tuple[int, list[float]]]]:
    """(image by id, (image id, box) by annotation id)."""
    values = read_json(path)
    try:
        images = {image["id"]: image for image in values["images"]}
        boxes = {}
        for annotation in values["annotations"]:
            x, y, width, height = annotation["bbox"]
            boxes[annotation["id"]] = (annotation["image_id"], [x, y, x + width, y + height])
        return images, boxes
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not COCO's images and annotations: {error!r}") from None


def _regions_of(
    ref: Mapping[str, Any], number: int, boxes: Mapping[int, tuple[int, list[float]]]
) -> list[Region | str]:
    name = f"reference {ref.get('ref_id', number)}"
    image_id, box = boxes.get(ref["ann_id"], (None, None))
    if box is None:
        return [f"{name}: {INSTANCES_FILE} has no annotation {ref['ann_id']!r}"]
    if image_id != ref["image_id"]:
        return [f"{name}: annotation {ref['ann_id']} is of image {image_id}, not of {ref['image_id']}"]
    sentences = ref["sentences"] if isinstance(ref["sentences"], list) else []
    texts = [sentence.get("sent") if isinstance(sentence, Mapping) else sentence for sentence in sentences]
    return [region(box, text, name) for text in texts] or [f"{name}: has no sentence"]


def _row(
    image_id: int, regions: Sequence[Region | str], sizes: Mapping[int, Mapping[str, Any]], images: Path
) -> RegionRow | str:
    image = sizes.get(image_id)
    try:
        if image is None:
            return f"{INSTANCES_FILE} has no image {image_id}"
        path = below(images, str(image["file_name"]), f"image {image_id}")
        return RegionRow(image=path, regions=tuple(regions), size=(image["width"], image["height"]))
    except KeyError as error:
        return f"{INSTANCES_FILE}: image {image_id} has no {error}"
    except DataError as error:
        return str(error)
