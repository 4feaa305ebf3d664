"""Writing what was mined: MMEB-train's tables with negatives, and a report of what was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agff.errors import DataError
from agff.files import partial_path, publish
from data_pipeline.work_blocks import BLOCKS_FOLDER
from launcher.embedding.taken_folder import CLAIM_FILE
from launcher.mining.subsets import MINING_FILE, Mining

_OWN = ("pos_similarity", "neg_similarity")
_COPIED = {"neg_text": "pos_text", "neg_image_path": "pos_image_path", "neg_inst": "pos_inst"}
"""A negative's column -> that of the target whose cells it has."""


@dataclass(frozen=True, kw_only=True)
class SubsetReport:
    """What became of the rows of a subset."""

    rows: int
    unusable: int
    """Rows whose query or target cannot be used: they have no negatives, and prepare rejects them again."""
    short: int
    """Rows with fewer than k negatives, those without any among them."""
    without: int
    """Rows without any, though they can be used."""
    negatives: int
    """Of all rows."""
    dropped: dict[str, int]
    """Pairs of query and candidate by the rule: `content`, `skip_ranks`, `max_rank`, `margin`."""


def finish(mining: Mining) -> dict[str, SubsetReport]:
    """Write all tables, links to the images and last mining.json. One process calls it, when all blocks are
    written. Raises DataError when one is missing, OSError."""
    if mining.work.is_finished:
        values = json.loads((mining.out / MINING_FILE).read_text(encoding="utf-8"))
        mining.work.clean_up()  # of a process that was killed before it did
        return {name: SubsetReport(**report) for name, report in values["report"].items()}
    notes = {subset: [mining.work.note(name) for name in mining.blocks(subset)] for subset in mining.rows}
    reports = {subset: _report(mining, subset, found) for subset, found in notes.items()}
    if not any(report.negatives for report in reports.values()):
        raise DataError(
            f"{mining.layout.root}: no row has a negative by these rules; raise --margin or --max_rank, and "
            f"remove {mining.out}"
        )
    for subset, found in notes.items():
        _write_tables(mining, subset, found)
    mining.work.finish(
        {
            **mining.settings(),
            "model": str(mining.model),
            "report": {name: asdict(report) for name, report in reports.items()},
        }
    )
    mining.work.clean_up()
    return reports


def _report(mining: Mining, subset: str, notes: Sequence[dict[str, Any]]) -> SubsetReport:
    counts = [len(rows) for note in notes for rows in note["negatives"].values()]
    dropped: Counter[str] = Counter()
    for note in notes:
        dropped.update(note["dropped"])
    return SubsetReport(
        rows=mining.rows[subset],
        unusable=mining.rows[subset] - len(counts),
        short=sum(count < mining.rules.num_negatives for count in counts),
        without=sum(count == 0 for count in counts),
        negatives=sum(counts),
        dropped={rule: dropped[rule] for rule in ("content", "skip_ranks", "margin", "max_rank")},
    )


def _write_tables(mining: Mining, subset: str, notes: Sequence[dict[str, Any]]) -> None:
    """Each table under its own name, with its rows in their order."""
    found: dict[str, dict[int, Any]] = {
        key: {int(row): value for note in notes for row, value in note[key].items()}
        for key in ("negatives", "similarity", "positive")
    }
    tables = [pq.read_table(path) for path in mining.layout.tables(subset)]
    whole = pa.concat_tables(map(_targets, tables), promote_options="default")
    subsets, start = set(mining.layout.sources()), 0
    (mining.out / subset).mkdir(exist_ok=True)
    for path, table in zip(mining.layout.tables(subset), tables, strict=True):
        rows = range(start, start + table.num_rows)
        start += table.num_rows
        partial = partial_path(mining.out / subset / path.name)
        pq.write_table(_with_negatives(table, whole, rows, found), partial)
        publish(partial, mining.out / subset / path.name)
        _link_images(mining, table, subsets)


def _targets(table: pa.Table) -> pa.Table:
    """Their cells as strings of one kind: each table may have another."""
    names = [name for name in _COPIED.values() if name in table.column_names]
    return pa.table({name: table.column(name).cast(pa.string()) for name in names})


def _with_negatives(
    table: pa.Table, whole: pa.Table, rows: range, found: dict[str, dict[int, Any]]
) -> pa.Table:
    """The table, its own negatives replaced. whole: targets of all rows of the subset."""
    names = [name for name in table.column_names if not name.startswith("neg_") and name not in _OWN]
    table = table.select(names).replace_schema_metadata(None)  # `datasets` would look for other columns
    lists = [found["negatives"].get(row, []) for row in rows]
    lengths = pa.array([len(each) for each in lists], type=pa.int32())
    offsets = pa.concat_arrays([pa.array([0], type=pa.int32()), pc.cumulative_sum(lengths)])
    taken = whole.take(pa.array([row for each in lists for row in each], type=pa.int64()))
    for name, source in _COPIED.items():
        if source in whole.column_names:
            cells = taken.column(source).combine_chunks()
            table = table.append_column(name, pa.ListArray.from_arrays(offsets, cells))
    positive = [found["positive"].get(row) for row in rows]
    table = table.append_column("pos_similarity", pa.array(positive, type=pa.float32()))
    similarity = [found["similarity"].get(row, []) for row in rows]
    return table.append_column("neg_similarity", pa.array(similarity, type=pa.list_(pa.float32())))


def _link_images(mining: Mining, table: pa.Table, subsets: set[str]) -> None:
    """Make the paths of the table lead to the images where they are."""
    for name in ("qry_image_path", "pos_image_path"):
        for link in _tops(table.column(name).unique().to_pylist(), subsets):
            place, target = mining.out / link, (mining.layout.root / link).resolve()
            if not (place.exists() or place.is_symlink()) and target.exists():
                place.parent.mkdir(exist_ok=True)
                place.symlink_to(target)


def _tops(paths: Iterable[str | None], subsets: set[str]) -> list[str]:
    """The first part of each path; where that is the folder of tables, the first two. Paths that leave the
    folder or name what is no image are no business of ours: prepare refuses them."""
    tops = set()
    for path in map(PurePosixPath, filter(None, paths)):
        depth = 2 if path.parts and path.parts[0] in subsets else 1
        top = PurePosixPath(*path.parts[:depth])
        if len(path.parts) < depth or path.is_absolute() or ".." in path.parts:
            continue
        if top.suffix != ".parquet" and top.name not in (MINING_FILE, BLOCKS_FOLDER, CLAIM_FILE):
            tops.add(str(top))
    return sorted(tops)


def report_table(reports: dict[str, SubsetReport], *, num_negatives: int) -> str:
    """For a person."""
    heads = ("rows", "negatives", "short", "none", "unusable", "content", "skipped", "margin", "beyond")
    lines = [f"{'subset':<24} " + " ".join(f"{head:>11}" for head in heads)]
    for name, report in sorted(reports.items()):
        counts = (
            report.rows, report.negatives, report.short, report.without, report.unusable,
            *report.dropped.values(),
        )  # fmt: skip
        lines.append(f"{name:<24} " + " ".join(f"{count:>11,}" for count in counts))
    return "\n".join(
        [
            *lines,
            f"short: rows with fewer than {num_negatives} negatives; none: without any; unusable: rows that "
            "cannot be embedded.",
            "Candidates that were left out: content, they are an answer of the query themselves; skipped, "
            "above --skip_ranks;",
            "margin, too much above the positive; beyond, below --max_rank, as nearly all are.",
        ]
    )
