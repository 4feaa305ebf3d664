from __future__ import annotations

import decimal
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agff.errors import DataError
from data_pipeline.layouts.mmeb_train import Pair, count_rows, find_subsets, read_pairs
from tests.mmeb import row, write_subset

FIRST = "original-00000-of-00001.parquet"


def write_column(root: Path, name: str, column: pa.Array) -> Path:
    """A subset of rows of text, one column of which is given."""
    columns = {key: [value] * len(column) for key, value in row().items()} | {name: column}
    (root / "Sub").mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "Sub" / FIRST)
    return root / "Sub" / FIRST


TEXTS = ["first", "second", "first"]
KINDS_OF_TEXT = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "categorical": pa.array(TEXTS).dictionary_encode(),
    "categorical of large_string": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", KINDS_OF_TEXT)
def test_text_of_every_kind_is_read_as_it_is(tmp_path: Path, kind: str) -> None:
    write_column(tmp_path, "qry", KINDS_OF_TEXT[kind])
    assert count_rows(tmp_path, "Sub", split="original") == 3
    pairs = list(read_pairs(tmp_path, "Sub", split="original", start=0, stop=3))
    assert [pair.query.text for pair in pairs if isinstance(pair, Pair)] == TEXTS


def values_of(type_: pa.DataType) -> list[Any]:
    """Two values of a type that is no text."""
    if pa.types.is_struct(type_):
        return [{"bytes": b"x", "path": "a.png"}] * 2
    if pa.types.is_nested(type_):
        return [["a"], ["b"]]
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_):
        return [b"a", b"b"]
    if pa.types.is_boolean(type_):
        return [True, False]
    return [decimal.Decimal(1), decimal.Decimal(2)] if pa.types.is_decimal(type_) else [1, 0]


NO_TEXT = (
    pa.bool_(),
    pa.int8(),
    pa.int64(),
    pa.float64(),
    pa.decimal128(3),
    pa.timestamp("s"),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.list_(pa.string()),
    pa.large_list(pa.string()),
    pa.list_(pa.string(), 1),
    pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    pa.dictionary(pa.int32(), pa.int64()),
    pa.dictionary(pa.int32(), pa.binary()),
)


@pytest.mark.parametrize("name", ["qry", "pos_image_path", "neg_text", "pos_inst"])
@pytest.mark.parametrize("type_", NO_TEXT, ids=str)
def test_a_column_of_anything_else_is_refused_with_its_address(
    tmp_path: Path, name: str, type_: pa.DataType
) -> None:
    plain = type_.value_type if pa.types.is_dictionary(type_) else type_
    column = pa.array([None, *values_of(plain)], plain)
    path = write_column(tmp_path, name, column.dictionary_encode() if plain != type_ else column)
    with pytest.raises(DataError) as caught:
        count_rows(tmp_path, "Sub", split="original")
    error = str(caught.value)
    assert error.startswith(f"{path}:row 1: column {name} holds ")
    assert error.endswith(f" ({pq.read_schema(path).field(name).type}); it must be text")


def test_a_null_cell_is_an_absent_value(tmp_path: Path) -> None:
    rows = [
        {**row(), "qry_image_path": None, "pos_image_path": None, "neg_text": None, "neg_image_path": None},
        {**row(), "qry": None, "neg_text": "other", "neg_image_path": None},
        {**row(), "pos_text": None, "pos_inst": None},
    ]
    write_subset(tmp_path, rows)
    assert count_rows(tmp_path, "Sub", split="original") == 3
    first, second, third = read_pairs(tmp_path, "Sub", split="original", start=0, stop=3)
    assert isinstance(first, Pair)
    assert (first.query.text, first.query.image, first.negative) == ("q", None, None)
    assert (second, third) == ("qry: neither text nor image", "pos: neither text nor image")


def test_a_negative_may_have_a_text_column_only(tmp_path: Path) -> None:
    write_subset(tmp_path, [row(neg_text="other")])
    (pair,) = read_pairs(tmp_path, "Sub", split="original", start=0, stop=1)
    assert isinstance(pair, Pair)
    assert pair.negative is not None
    assert (pair.negative.text, pair.negative.image) == ("other", None)


def test_every_finding_of_a_subset_is_listed(tmp_path: Path) -> None:
    write_subset(tmp_path, [{"qry": 1, "pos_text": 2.5, "neg_text": "x"}])
    table = pa.Table.from_pylist([row()])
    table = table.append_column("qry", table.column("qry"))
    folder = tmp_path / "Sub"
    (folder / FIRST).rename(folder / "original-00000-of-00004.parquet")
    pq.write_table(table, folder / "original-00001-of-00004.parquet")
    (folder / "original-00002-of-00004.parquet").write_text("no parquet")
    with pytest.raises(DataError) as caught:
        count_rows(tmp_path, "Sub", split="original")
    lines = str(caught.value).splitlines()
    parts = [f"{folder}/original-0000{number}-of-00004.parquet:" for number in range(3)]
    expected = [
        f"{folder}/original: 1 of 4 parts missing: -00003-of-00004",
        f"{parts[0]} missing columns qry_image_path, pos_image_path; found qry, pos_text, neg_text",
        f"{parts[0]}row 0: column qry holds 1 (int64)",
        f"{parts[0]}row 0: column pos_text holds 2.5 (double)",
        f"{parts[1]} column qry is there twice",
        f"{parts[2]} cannot read the parquet file",
    ]
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def parts_of_two(folder: Path) -> None:
    """`original` in two parts, `diverse_instruction` in one."""
    for index in range(2):
        table = pa.Table.from_pylist([row(qry=f"part {index}")])
        pq.write_table(table, folder / f"original-0000{index}-of-00002.parquet")
    pq.write_table(table, folder / "diverse_instruction-00000-of-00001.parquet")


SECOND = "original-00001-of-00002.parquet"
INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a part is absent": (
        lambda folder: (folder / SECOND).unlink(),
        "1 of 2 parts missing: -00001-of-00002",
    ),
    "a part of the other split is no part of this one": (
        lambda folder: (folder / SECOND).rename(folder / "diverse_instruction-00001-of-00002.parquet"),
        "1 of 2 parts missing: -00001-of-00002",
    ),
    "two versions side by side": (
        lambda folder: shutil.copy(folder / SECOND, folder / FIRST),
        "of two versions; remove the files of one of them",
    ),
    "a part copied over another": (
        lambda folder: shutil.copy(folder / "original-00000-of-00002.parquet", folder / SECOND),
        "has the same bytes as original-00000-of-00002.parquet",
    ),
    "a part downloaded once more": (
        lambda folder: shutil.copy(folder / SECOND, folder / f"{Path(SECOND).stem} (1).parquet"),
        "original-00001-of-00002 (1).parquet: is none of the parts beside it; remove it",
    ),
    "the whole beside its parts": (
        lambda folder: pq.write_table(pq.read_table(folder / SECOND), folder / "original-all.parquet"),
        "original-all.parquet: is none of the parts beside it; remove it",
    ),
    "a table that belongs to no split": (
        lambda folder: (folder / SECOND).rename(folder / "original.parquet"),
        "original.parquet: is not named original-*.parquet or diverse_instruction-*.parquet and would not",
    ),
    "no row at all": (
        lambda folder: [
            pq.write_table(pa.Table.from_pylist([row(x=str(n))])[:0], path)
            for n, path in enumerate(sorted(folder.glob("original-*")))
        ],
        "no rows; name the other subsets with --subsets",
    ),
    "only the other split": (
        lambda folder: [path.unlink() for path in folder.glob("original-*")],
        "no original-*.parquet, there are diverse_instruction-00000-of-00001.parquet",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_part_of_a_subset_does_not_pass_for_the_whole(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "Sub"
    folder.mkdir()
    parts_of_two(folder)
    write_subset(tmp_path, [row()], "Whole")
    assert count_rows(tmp_path, "Sub", split="original") == 2
    damage, message = INCOMPLETE[case]
    damage(folder)
    assert find_subsets(tmp_path, split="original") == ["Sub", "Whole"], "it is named, not left out"
    with pytest.raises(DataError) as caught:
        count_rows(tmp_path, "Sub", split="original")
    assert message in str(caught.value)
