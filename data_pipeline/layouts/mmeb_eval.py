"""MMEB-eval's layout -> evaluation sets of unique items.

One folder per set under the root: `<root>/<SET>/*.parquet`. Two column variants are read: `qry_text,
qry_img_path, tgt_text, tgt_img_path`, whose texts are complete, and the newer one with `qry_inst` and
`tgt_inst`, whose texts are put together here into what the first variant would say. An image column may hold
paths or the structs {bytes, path} of Hugging Face `datasets`: their bytes, else the path.

An image path of a table is looked for under `images_root` when one is named (the real MMEB-eval unpacks its
images wherever the user likes), else under `<root>/images/` and then under `<root>/`.

`<root>/sets.json` may describe your own sets: `{SET: {"meta_task": ..., "in_distribution": ..., "note":
...}}`; a "note" beside the sets holds for all of them. The 36 sets of MMEB are built in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agff.errors import DataError
from data_pipeline.layouts.columns import ColumnKind, column_names, image_cell, read_rows
from data_pipeline.layouts.eval_items import EmbeddedImage, ItemTable, UniqueItems, refuse_all
from data_pipeline.layouts.mmeb_sets import SetInfo
from data_pipeline.layouts.parts import check_parts, copies

_COLUMNS = {
    "qry_text": ColumnKind(is_image=False, many=False),
    "qry_img_path": ColumnKind(is_image=True, many=False),
    "tgt_text": ColumnKind(is_image=False, many=True),
    "tgt_img_path": ColumnKind(is_image=True, many=True),
}
_INSTRUCTIONS = {name: ColumnKind(is_image=False, many=False) for name in ("qry_inst", "tgt_inst")}


@dataclass(frozen=True, kw_only=True)
class EvalSet(ItemTable):
    """One set: `queries[i]` and `candidates[i]` are indexes into `items`, which holds no item twice."""

    info: SetInfo
    queries: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    """Per query: the truth first, no item twice, at least two of them."""
    num_queries_left_out: int = 0
    num_candidates_left_out: int = 0
    """Over all queries that are scored."""

    @property
    def used(self) -> tuple[int, ...]:
        """The items that a query or a list of candidates names, in order."""
        return tuple(sorted({*self.queries, *(item for row in self.candidates for item in row)}))

    def without(self, gone: Collection[int]) -> EvalSet:
        """The set as it is scored when these items cannot be used.

        A query is left out when its own item or its truth is gone, or when nothing beside its truth remains;
        any other candidate that is gone is left out of the lists. Both are counted, the lists' entries for
        the queries that remain. Items keep their indexes.
        """
        kept = []
        num_candidates_left_out = 0
        for query, candidates in zip(self.queries, self.candidates, strict=True):
            left = tuple(item for item in candidates if item not in gone)
            if query in gone or candidates[0] in gone or len(left) < 2:
                continue
            kept.append((query, left))
            num_candidates_left_out += len(candidates) - len(left)
        return replace(
            self,
            queries=tuple(query for query, _ in kept),
            candidates=tuple(left for _, left in kept),
            num_queries_left_out=self.num_queries_left_out + len(self.queries) - len(kept),
            num_candidates_left_out=self.num_candidates_left_out + num_candidates_left_out,
        )


def read_eval_set(
    root: Path, name: str, info: SetInfo, *, images_root: Path | None, max_queries: int | None
) -> EvalSet:
    """One set; of a long one only the first `max_queries`. No image has been opened; items whose image is
    missing, or whose text does not fit, are among the `findings`.

    Raises DataError with the addresses (set, file, row) of what is wrong with tables and rows.
    """
    items = UniqueItems((images_root,) if images_root is not None else (root / "images", root))
    queries: list[int] = []
    candidates: list[tuple[int, ...]] = []
    findings: list[str] = []
    for address, row in _rows(root / name):
        if len(queries) == max_queries:
            break
        image = image_cell(row["qry_img_path"])
        queries.append(items.add("qry", _instruction(row, "qry"), row["qry_text"], image, address))
        instruction = _instruction(row, "tgt")
        try:
            targets = [items.add("tgt", instruction, *cells, address) for cells in _targets(row, address)]
        except DataError as error:
            findings.append(str(error))
            targets = []
        else:
            if len(set(targets)) < 2:
                findings.append(
                    f"{address}: no candidates beside the truth; a query needs at least one other target"
                )
        candidates.append(tuple(dict.fromkeys(targets)))
    refuse_all(findings, remedy="")
    if not queries:
        raise DataError(f"{root / name}: no rows")
    return EvalSet(
        name=name,
        info=info,
        items=items.items,
        addresses=items.addresses,
        findings=items.findings,
        queries=tuple(queries),
        candidates=tuple(candidates),
    )


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(address, row) of all tables of a set."""
    paths = sorted(folder.glob("*.parquet"))
    check_parts(paths)
    with_rows: dict[Path, None] = {}
    for path in paths:
        is_instructed = any(name in _INSTRUCTIONS for name in column_names(path))
        for number, row in read_rows(path, {**_COLUMNS, **(_INSTRUCTIONS if is_instructed else {})}):
            with_rows[path] = None
            yield f"{folder.name}/{path.name}:row {number}", row
    refuse_all(copies(with_rows), remedy="")


def _instruction(row: dict[str, Any], role: str) -> str | None:
    """None in the variant without instructions; "" where a row leaves its instruction out."""
    name = f"{role}_inst"
    return row[name] or "" if name in row else None


def _targets(row: dict[str, Any], address: str) -> Iterator[tuple[str | None, str | EmbeddedImage]]:
    """(text, image) of each candidate."""
    columns = {name: row[name] for name in ("tgt_text", "tgt_img_path")}
    size = max(len(value) if isinstance(value, list) else 1 for value in columns.values())
    texts, images = (_column(name, value, size, address) for name, value in columns.items())
    return zip(texts, map(image_cell, images), strict=True)


def _column(name: str, value: Any, size: int, address: str) -> list[Any]:
    """`value` as one entry per candidate; one value, or nothing, holds for all of them."""
    if not isinstance(value, list) or not value:
        return [value or None] * size
    if len(value) != size:
        raise DataError(f"{address}: {name} has {len(value)} entries for {size} candidates")
    return value
