"""MMEB-train's layout: parquet and image files -> pairs, or the reason why a row cannot be used.

<root>/<SUBSET>/original-00000-of-00001.parquet    qry, qry_image_path, pos_text, pos_image_path,
                                                   neg_text, neg_image_path
               diverse_instruction-...parquet      the other split: the same columns
<root>/images/<SUBSET>/Train/<file>                named by those columns, below the root; "" when absent

In these columns instruction and content are one text. Your own source may keep them apart in qry_inst,
pos_inst, neg_inst, as the newer MMEB-eval does: then they are joined as MMEB's texts are, and the shard says
which part is which. A null cell is an absent value, as "" is.

Your own source may also have several explicit negatives a row: in neg_text_1, neg_image_path_1, neg_text_2,
... beside neg_text, neg_image_path, or as lists in any of these columns. Absent ones are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agff.batch import IMAGE_PLACEHOLDER, MMEB_TEXTS, instructed_text, text_problem, without_placeholder
from agff.errors import DataError
from data_pipeline.layouts.columns import ColumnKind, open_table, rows_between, schema_findings
from data_pipeline.layouts.parts import check_parts, copies
from data_pipeline.layouts.training_rows import IMAGE_ALONE, Pair, Side, below

_REQUIRED = ("qry", "qry_image_path", "pos_text", "pos_image_path")
_OPTIONAL = ("qry_inst", "pos_inst")
_OF_NEGATIVES = re.compile(r"neg_(?:text|image_path|inst)(?P<number>|_\d+)", re.ASCII)
_TEXT, _TEXTS = ColumnKind(is_image=False, many=False), ColumnKind(is_image=False, many=True)
SPLITS = ("original", "diverse_instruction")

_Row = Mapping[str, Any]


def find_subsets(root: Path, *, split: str) -> list[str]:
    """Names of the folders that hold parquet files, hidden ones aside. Raises DataError when none has one of
    this split."""
    paths = [path for path in root.glob("*/*.parquet") if not path.parent.name.startswith(".")]
    if not any(path.match(f"{split}-*.parquet") for path in paths):
        raise DataError(
            f"{root}: no <SUBSET>/{split}-*.parquet here; give the folder of an MMEB-train download, or "
            "write tables like its of your pairs (data_pipeline/README.md)"
        )
    return sorted({path.parent.name for path in paths})


@dataclass(frozen=True, kw_only=True)
class MmebTrain:
    """A download as a layout: its subsets are the sources."""

    root: Path
    split: str

    @property
    def settings(self) -> Mapping[str, Any]:
        """See Layout."""
        return {"split": self.split}

    def sources(self) -> list[str]:
        """See Layout."""
        return find_subsets(self.root, split=self.split)

    def count_rows(self, source: str) -> int:
        """See Layout."""
        return count_rows(self.root, source, split=self.split)

    def rows(self, source: str, *, start: int, stop: int) -> Iterator[Pair | str]:
        """See Layout."""
        return read_pairs(self.root, source, split=self.split, start=start, stop=stop)

    def tables(self, source: str) -> list[Path]:
        """See Layout."""
        return _parquet_files(self.root, source, split=self.split)


def _parquet_files(root: Path, subset: str, *, split: str) -> list[Path]:
    """The subset's parquet files in order."""
    return sorted((root / subset).glob(f"{split}-*.parquet"))


def count_rows(root: Path, subset: str, *, split: str) -> int:
    """Rows of a subset, from the files' footers.

    Raises DataError, with one line for each finding, for a subset of which a part is absent or there twice,
    that has no row, or a table without the columns of text that MMEB-train has.
    """
    paths = _parquet_files(root, subset, split=split)
    if not paths:
        found = ", ".join(sorted(path.name for path in (root / subset).glob("*.parquet")))
        raise DataError(
            f"{root / subset}: no {split}-*.parquet, there are {found}; choose another --split, or name the "
            "other subsets with --subsets"
        )
    findings, counts = _findings_of_names(paths, split), {}
    for path in paths:
        try:
            counts[path] = rows_of_table(path)
        except DataError as error:
            findings.append(str(error))
    findings += copies(path for path, count in counts.items() if count)
    if not findings and not sum(counts.values()):
        findings = [f"{root / subset}: {split}-*.parquet: no rows; name the other subsets with --subsets"]
    if findings:
        raise DataError("\n".join(findings))
    return sum(counts.values())


def rows_of_table(path: Path) -> int:
    """Rows of one table, from its footer. Raises DataError, with a line for each finding, for one that cannot
    be read or lacks the columns that MMEB-train has."""
    try:
        with open_table(path) as file:
            findings = schema_findings(file, _columns(file.schema_arrow.names), path)
            count: int = file.metadata.num_rows
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the parquet file: {error}; download it again") from None
    if findings:
        raise DataError("\n".join(findings))
    return count


def _findings_of_names(paths: Sequence[Path], split: str) -> list[str]:
    """Parts that are absent, or there in two versions; tables that belong to no split."""
    findings = []
    try:
        check_parts(paths)
    except DataError as error:
        findings.append(str(error))
    others = [path for path in paths if not re.fullmatch(rf"{split}-\d+-of-\d+", path.stem)]
    if len(others) < len(paths):
        findings += [f"{path}: is none of the parts beside it; remove it" for path in others]
    splits = " or ".join(f"{name}-*.parquet" for name in SPLITS)
    findings += [
        f"{path}: is not named {splits} and would not be read; rename or remove it"
        for path in sorted(paths[0].parent.glob("[!.]*.parquet"))
        if not any(path.match(f"{name}-*.parquet") for name in SPLITS)
    ]
    return findings


def read_pairs(root: Path, subset: str, *, split: str, start: int, stop: int) -> Iterator[Pair | str]:
    """Rows start .. stop - 1 of a subset: a Pair, or the reason why the row cannot be used."""
    return pairs_of_tables(root, _parquet_files(root, subset, split=split), start=start, stop=stop)


def pairs_of_tables(root: Path, paths: Sequence[Path], *, start: int, stop: int) -> Iterator[Pair | str]:
    """Rows start .. stop - 1 of tables that follow each other, images below `root`."""
    for values in rows_between(paths, lambda names: list(_columns(names)), start=start, stop=stop):
        try:
            yield _pair(root, values)
        except DataError as error:
            yield str(error)


def _columns(found: Iterable[str]) -> dict[str, ColumnKind]:
    """What is read of a table with these columns."""
    optional = [name for name in found if name in _OPTIONAL]
    of_negatives = [name for name in found if _OF_NEGATIVES.fullmatch(name)]
    return dict.fromkeys((*_REQUIRED, *optional), _TEXT) | dict.fromkeys(of_negatives, _TEXTS)


def _pair(root: Path, values: _Row) -> Pair:
    def side(name: str, text: str) -> Side:
        cells = (values.get(column) or "" for column in (text, f"{name}_image_path", f"{name}_inst"))
        return _side(root, name, *cells)

    return Pair(
        query=side("qry", "qry"),
        target=side("pos", "pos_text"),
        negatives=tuple(_negatives(root, values)),
    )


def _negatives(root: Path, values: _Row) -> Iterator[Side]:
    matches = (_OF_NEGATIVES.fullmatch(name) for name in values)
    for number in sorted({match["number"] for match in matches if match}, key=lambda n: int(n[1:] or -1)):
        columns = [f"neg_{part}{number}" for part in ("text", "image_path", "inst")]
        texts, images, instructions = (_as_list(values.get(column)) for column in columns)
        count = max(len(texts), len(images))
        if len(instructions) == 1:  # one for all
            instructions *= count
        lists = [cells or [""] * count for cells in (texts, images, instructions)]
        if any(len(cells) != count for cells in lists):
            raise DataError(
                f"neg{number}: {len(texts)} texts, {len(images)} image paths, {len(instructions)} "
                "instructions; lists of one row must be equally long"
            )
        for place, (text, image, instruction) in enumerate(zip(*lists, strict=True)):
            if text or image:
                name = f"neg{number}[{place}]" if count > 1 else f"neg{number}"
                yield _side(root, name, text, image, instruction)


def _as_list(cell: str | list[str | None] | None) -> list[str]:
    cells = cell if isinstance(cell, list) else [cell] if cell else []
    return [value or "" for value in cells]


def _side(root: Path, name: str, text: str, image_path: str, given: str) -> Side:
    """given: the instruction, where it has a column of its own."""
    instruction = given.replace(IMAGE_PLACEHOLDER, "").strip()
    if given:
        text = instructed_text(given, text, is_query=name == "qry", has_image=bool(image_path))
    if not image_path:
        stripped = without_placeholder(text)
        if not stripped.strip():
            raise DataError(f"{name}: neither text nor image")
        return Side(text=stripped, instruction=instruction if instruction in stripped else "")
    if not text:
        text, instruction = MMEB_TEXTS.image_alone, IMAGE_ALONE
    if problem := text_problem(text, has_image=True):
        raise DataError(f"{name}: {problem}")
    return Side(text=text, image=below(root, image_path, name), instruction=instruction)
