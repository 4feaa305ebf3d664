"""MMEB-eval's layout -> evaluation sets of unique items.

One folder per set under the root: `<root>/<SET>/*.parquet`. Two column variants are read: `qry_text,
qry_img_path, tgt_text, tgt_img_path`, whose texts are complete, and the newer one with `qry_inst` and
`tgt_inst`, whose texts are put together here into what the first variant would say.

An image path of a table is looked for under `images_root` when one is named (the real MMEB-eval unpacks its
images wherever the user likes), else under `<root>/images/` and then under `<root>/`.

`<root>/sets.json` may describe sets of one's own: `{SET: {"meta_task": ..., "in_distribution": ..., "note":
...}}`; a "note" beside the sets holds for all of them. The 36 sets of MMEB are built in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agff.batch import text_problem
from agff.errors import DataError
from agff.item_text import MMEB_TEXTS, instructed_text, without_placeholder

_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
_INSTRUCTION_COLUMNS = ("qry_inst", "tgt_inst")

# meta-task -> (sets whose training part is in MMEB-train, sets never trained on)
_MMEB_SETS = {
    "classification": (
        ("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
        ("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    ),
    "vqa": (
        ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"),
        ("ScienceQA", "VizWiz", "GQA", "TextVQA"),
    ),
    "retrieval": (
        (
            "VisDial",
            "CIRR",
            "VisualNews_t2i",
            "VisualNews_i2t",
            "MSCOCO_t2i",
            "MSCOCO_i2t",
            "NIGHTS",
            "WebQA",
        ),
        ("FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    ),
    "grounding": (("MSCOCO",), ("RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")),
}


@dataclass(frozen=True)
class EvalItem:
    """One thing to embed, its image still a file. Equal items are encoded once."""

    text: str
    image_path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """Where a set's score belongs in the report."""

    meta_task: str
    in_distribution: bool
    note: str | None = None
    """A sentence that must stand wherever the score is printed."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """One set: `queries[i]` and `candidates[i]` are indexes into `items`, which holds no item twice."""

    name: str
    info: SetInfo
    items: tuple[EvalItem, ...]
    queries: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    """Per query: the truth first, no item twice, at least two of them."""


MMEB_SETS: Mapping[str, SetInfo] = {
    name: SetInfo(meta_task=meta_task, in_distribution=names is in_distribution)
    for meta_task, (in_distribution, out_of_distribution) in _MMEB_SETS.items()
    for names in (in_distribution, out_of_distribution)
    for name in names
}
"""The 36 sets of MMEB."""


def find_eval_sets(root: Path) -> dict[str, SetInfo]:
    """Sets under `root` in the order of sets.json, then by name. Raises DataError when there is none or one
    is unknown."""
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; name the folder that holds one folder per set (--mmeb_eval)"
        )
    listed = read_sets_json(root)
    folders = sorted({table.parent.name for table in root.glob("*/*.parquet")})
    if absent := [name for name in listed if name not in folders]:
        raise DataError(f"{root}: sets.json lists {absent[0]}, but there is no {absent[0]}/*.parquet")
    names = [*listed, *(name for name in folders if name not in listed)]
    if not names:
        raise DataError(f"{root}: found no <SET>/*.parquet")
    known = {**MMEB_SETS, **listed}
    if unknown := [name for name in names if name not in known]:
        raise DataError(
            f"{root}/{unknown[0]}: not one of MMEB's 36 sets; describe it in {root}/sets.json, "
            f'{{"{unknown[0]}": {{"meta_task": "retrieval", "in_distribution": false}}}}'
        )
    return {name: known[name] for name in names}


def read_sets_json(root: Path) -> dict[str, SetInfo]:
    """The sets that `<root>/sets.json` describes; empty when there is no such file."""
    path = root / "sets.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        common_note = content.pop("note", None)
        return {
            name: SetInfo(
                meta_task=str(entry["meta_task"]),
                in_distribution=bool(entry["in_distribution"]),
                note=entry.get("note", common_note),
            )
            for name, entry in content.items()
        }
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f'{path}: expected {{SET: {{"meta_task": TEXT, "in_distribution": true or false}}}}, found '
            f"{error!r}"
        ) from None


def read_eval_set(
    root: Path, name: str, info: SetInfo, *, images_root: Path | None, max_queries: int | None
) -> EvalSet:
    """One set; of a long one only the first `max_queries`. Every image is known to exist, none has been
    opened.

    Raises DataError with the address (set, file, row) of what is wrong.
    """
    items = _UniqueItems((images_root,) if images_root is not None else (root / "images", root))
    queries: list[int] = []
    candidates: list[tuple[int, ...]] = []
    for address, row in _rows(root / name):
        if len(queries) == max_queries:
            break
        queries.append(
            items.add("qry", _instruction(row, "qry"), row["qry_text"], row["qry_img_path"], address)
        )
        targets = (
            items.add("tgt", _instruction(row, "tgt"), text, image, address)
            for text, image in _targets(row, address)
        )
        candidates.append(tuple(dict.fromkeys(targets)))
        if len(candidates[-1]) < 2:
            raise DataError(
                f"{address}: no candidates beside the truth; a query needs at least one other target"
            )
    if not queries:
        raise DataError(f"{root / name}: no rows")
    return EvalSet(
        name=name, info=info, items=items.items, queries=tuple(queries), candidates=tuple(candidates)
    )


class _UniqueItems:
    """The items of a set so far. A table names each of them up to a thousand times; it is checked the first
    time only."""

    def __init__(self, image_roots: tuple[Path, ...]) -> None:
        self._image_roots = image_roots
        self._index: dict[EvalItem, int] = {}
        self._index_of_cell: dict[tuple[str, str | None, str | None, str | None], int] = {}

    @property
    def items(self) -> tuple[EvalItem, ...]:
        return tuple(self._index)

    def add(
        self, role: str, instruction: str | None, text: str | None, image: str | None, address: str
    ) -> int:
        """Index of the item that these cells of a row describe. role: "qry" or "tgt"; instruction None: text
        complete."""
        cell = (role, instruction, text, image)
        if cell not in self._index_of_cell:
            item = self._item(role, instruction, text or "", image or "", address)
            self._index_of_cell[cell] = self._index.setdefault(item, len(self._index))
        return self._index_of_cell[cell]

    def _item(self, role: str, instruction: str | None, text: str, image: str, address: str) -> EvalItem:
        if instruction is not None:
            text = instructed_text(instruction, text, is_query=role == "qry", has_image=bool(image))
        text = _checked_text(text, f"{address}: {role}_text", has_image=bool(image))
        return EvalItem(text, _find_image(image, self._image_roots, address) if image else None)


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(address, row) of all tables of a set; rows are read in small batches, as one may hold a thousand
    candidates."""
    for path in sorted(folder.glob("*.parquet")):
        try:
            with pq.ParquetFile(path) as table:
                columns = _columns(table.schema_arrow.names, path)
                number = 0
                for batch in table.iter_batches(batch_size=64, columns=columns):
                    for row in batch.to_pylist():
                        yield f"{folder.name}/{path.name}:row {number}", row
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _columns(found: list[str], path: Path) -> list[str]:
    is_instructed = any(name in found for name in _INSTRUCTION_COLUMNS)
    needed = [*_COLUMNS, *(_INSTRUCTION_COLUMNS if is_instructed else ())]
    if missing := [name for name in needed if name not in found]:
        raise DataError(f"{path}: missing columns {', '.join(missing)}; found {', '.join(found)}")
    return needed


def _instruction(row: dict[str, Any], role: str) -> str | None:
    """None in the variant without instructions; "" where a row leaves its instruction out."""
    name = f"{role}_inst"
    return row[name] or "" if name in row else None


def _targets(row: dict[str, Any], address: str) -> Iterator[tuple[str | None, str | None]]:
    """(text, image) of each candidate."""
    columns = {name: row[name] for name in ("tgt_text", "tgt_img_path")}
    size = max(len(value) if isinstance(value, list) else 1 for value in columns.values())
    return zip(*(_column(name, value, size, address) for name, value in columns.items()), strict=True)


def _column(name: str, value: Any, size: int, address: str) -> list[str | None]:
    """`value` as one entry per candidate; one text, or nothing, holds for all of them."""
    if not isinstance(value, list) or not value:
        return [value or ""] * size
    if len(value) != size:
        raise DataError(f"{address}: {name} has {len(value)} entries for {size} candidates")
    return value


def _checked_text(text: str, address: str, *, has_image: bool) -> str:
    """The text with the placeholder exactly once beside an image and never without one."""
    if not has_image:
        text = without_placeholder(text)
        if not text.strip():
            raise DataError(f"{address} is empty and there is no image")
        return text
    text = text or MMEB_TEXTS.image_alone
    if problem := text_problem(text, has_image=True):
        raise DataError(f"{address}: {problem}")
    return text


def _find_image(image: str, roots: tuple[Path, ...], address: str) -> Path:
    relative = PurePosixPath(image)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(
            f"{address}: image path {image!r} leaves the images folder; paths must be relative and inside it"
        )
    for root in roots:
        if (path := root / relative).is_file():
            return path
    tried = " and ".join(str(root) for root in roots)
    raise DataError(
        f"{address}: image {image!r} not found under {tried}; name the images' folder (--mmeb_images)"
    )
