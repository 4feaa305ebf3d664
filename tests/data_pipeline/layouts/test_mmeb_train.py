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
from data_pipeline.layouts.mmeb_train import count_rows, find_subsets, read_pairs
from data_pipeline.layouts.training_rows import Pair
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
    may_be_list = name.startswith("neg_")
    if may_be_list and pa.types.is_nested(type_) and not pa.types.is_struct(type_):
        type_ = pa.list_(pa.int64())
    plain = type_.value_type if pa.types.is_dictionary(type_) else type_
    values = [[1], [2]] if type_ == pa.list_(pa.int64()) else values_of(plain)
    column = pa.array([None, *values], plain)
    path = write_column(tmp_path, name, column.dictionary_encode() if plain != type_ else column)
    with pytest.raises(DataError) as caught:
        count_rows(tmp_path, "Sub", split="original")
    error = str(caught.value)
    assert error.startswith(f"{path}:row 1: column {name} holds ")
    rule = "it must be text, or a list of such" if may_be_list else "it must be text"
    assert error.endswith(f" ({pq.read_schema(path).field(name).type}); {rule}")


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
    assert (first.query.text, first.query.image, first.negatives) == ("q", None, ())
    assert (second, third) == ("qry: neither text nor image", "pos: neither text nor image")


def test_a_negative_may_have_a_text_column_only(tmp_path: Path) -> None:
    write_subset(tmp_path, [row(neg_text="other")])
    (pair,) = read_pairs(tmp_path, "Sub", split="original", start=0, stop=1)
    assert isinstance(pair, Pair)
    assert [(side.text, side.image) for side in pair.negatives] == [("other", None)]


def sides(pair: Pair | str) -> list[tuple[str, str | None, str]]:
    """(text, image, instruction) of each negative."""
    assert isinstance(pair, Pair)
    return [(s.text, s.image.name if s.image else None, s.instruction) for s in pair.negatives]


ALONE, REPRESENT = "<|image_1|>\nRepresent the given image.\n", "Represent the given image."


def test_several_negatives_come_from_numbered_columns_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    numbers = ("_10", "", "_2", "_1")
    rows = [
        row(**{f"neg_text{n}": f"n{n}" for n in numbers}),
        row(neg_text_2="two", neg_image_path_1="a.png", neg_inst_2="Find:"),
        row(neg_text="", neg_text_10="ten"),
        row(),
    ]
    columns = {key for values in rows for key in values}
    write_subset(tmp_path, [{**dict.fromkeys(columns, ""), **values} for values in rows])
    assert count_rows(tmp_path, "Sub", split="original") == 4
    found = [sides(pair) for pair in read_pairs(tmp_path, "Sub", split="original", start=0, stop=4)]
    assert found == [
        [(f"n{n}", None, "") for n in ("", "_1", "_2", "_10")],
        [(ALONE, "a.png", REPRESENT), ("two", None, "")],
        [("ten", None, "")],
        [],
    ]


def test_several_negatives_come_from_lists_and_uneven_ones_are_rejected(tmp_path: Path) -> None:
    image_text = "<|image_1|>\nx\n"
    rows = [
        {"neg_text": ["a", "b", None, ""], "neg_image_path": None, "neg_text_1": "c"},
        {"neg_text": [image_text, "", "b"], "neg_image_path": ["a.png", "b.png", ""], "neg_text_1": None},
        {"neg_text": None, "neg_image_path": ["a.png", "b.png"], "neg_text_1": ""},
        {"neg_text": [], "neg_image_path": [], "neg_text_1": None},
        {"neg_text": ["a", "b"], "neg_image_path": ["a.png"], "neg_text_1": None},
        {"neg_text": ["a", "<|image_1|>"], "neg_image_path": ["", "../b.png"], "neg_text_1": None},
    ]
    write_subset(tmp_path, [{**row(), **values} for values in rows])
    assert count_rows(tmp_path, "Sub", split="original") == 6
    *used, uneven, outside = read_pairs(tmp_path, "Sub", split="original", start=0, stop=6)
    assert [sides(pair) for pair in used] == [
        [("a", None, ""), ("b", None, ""), ("c", None, "")],
        [(image_text, "a.png", ""), (ALONE, "b.png", REPRESENT), ("b", None, "")],
        [(ALONE, "a.png", REPRESENT), (ALONE, "b.png", REPRESENT)],
        [],
    ]
    assert uneven == "neg: 2 texts, 1 image paths, 0 instructions; lists of one row must be equally long"
    assert outside == "neg[1]: image path '../b.png' leaves the folder of the images"


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
