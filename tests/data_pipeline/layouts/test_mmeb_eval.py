"""MMEB-eval's layout, both variants, and every way it can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agff.errors import DataError
from data_pipeline.layouts.eval_items import EmbeddedImage, EvalItem
from data_pipeline.layouts.mmeb_eval import EvalSet, read_eval_set
from data_pipeline.layouts.mmeb_sets import SetInfo

INFO = SetInfo(meta_task="retrieval", in_distribution=False)


def write_set(root: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / name / "test-00000-of-00001.parquet")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def read(
    root: Path, name: str = "S", *, images_root: Path | None = None, max_queries: int | None = None
) -> EvalSet:
    return read_eval_set(root, name, INFO, images_root=images_root, max_queries=max_queries)


def text_row(**changes: Any) -> dict[str, Any]:
    return {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""], **changes}


def test_unique_items_are_listed_once_and_the_truth_stands_first(tmp_path: Path) -> None:
    image = touch(tmp_path / "images/S/a b.jpg")
    query = "<|image_1|>\nWhat?\n"
    rows = [
        {
            "qry_text": query,
            "qry_img_path": "S/a b.jpg",
            "tgt_text": ["x", "y", "x"],
            "tgt_img_path": ["", "", ""],
        },
        {
            "qry_text": query,
            "qry_img_path": "S/a b.jpg",
            "tgt_text": ["y", "z"],
            "tgt_img_path": [None, None],
        },
    ]
    write_set(tmp_path, "S", rows)
    eval_set = read(tmp_path)
    assert eval_set.items == (EvalItem(query, image), EvalItem("x"), EvalItem("y"), EvalItem("z"))
    assert eval_set.queries == (0, 0)
    assert eval_set.candidates == ((1, 2), (2, 3))


def test_instructions_make_the_same_items_as_complete_texts(tmp_path: Path) -> None:
    touch(tmp_path / "p.jpg")
    represent = "<|image_1|>\nRepresent the given image.\n"
    complete = [
        {
            "qry_text": "<|image_1|>\nWhich group? x\n",
            "qry_img_path": "p.jpg",
            "tgt_text": ["a", "b"],
            "tgt_img_path": ["", ""],
        },
        {
            "qry_text": "Find: x\n",
            "qry_img_path": "",
            "tgt_text": [represent, "b"],
            "tgt_img_path": ["p.jpg", ""],
        },
    ]
    instructed = [
        {
            "qry_inst": "<|image_1|>\nWhich group?",
            "qry_text": "x",
            "qry_img_path": "p.jpg",
            "tgt_inst": "",
            "tgt_text": ["a", "b"],
            "tgt_img_path": ["", ""],
        },
        {
            "qry_inst": "Find:",
            "qry_text": "x\n",
            "qry_img_path": "",
            "tgt_inst": "<|image_1|> Represent the given image.",
            "tgt_text": ["", "b"],
            "tgt_img_path": ["p.jpg", ""],
        },
    ]
    write_set(tmp_path, "V1", complete)
    write_set(tmp_path, "V2", instructed)
    first, second = read(tmp_path, "V1"), read(tmp_path, "V2")
    assert (first.items, first.queries, first.candidates) == (second.items, second.queries, second.candidates)


def test_one_empty_text_holds_for_all_candidate_images(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        touch(tmp_path / name)
    write_set(tmp_path, "S", [text_row(tgt_text="", tgt_img_path=["1.jpg", "2.jpg"])])
    assert {item.text for item in read(tmp_path).items[1:]} == {"<|image_1|>\nRepresent the given image.\n"}


def test_placeholder_without_an_image_is_stripped(tmp_path: Path) -> None:
    write_set(tmp_path, "S", [text_row(qry_text="<|image_1|>\nWho?\n")])
    assert read(tmp_path).items[0] == EvalItem("Who?\n")


def test_images_are_found_in_images_then_root_or_only_where_told(tmp_path: Path) -> None:
    rows = [text_row(qry_text="<|image_1|>\n?\n", qry_img_path="S/1.jpg")]
    write_set(tmp_path, "S", rows)
    in_root = touch(tmp_path / "S/1.jpg")
    assert read(tmp_path).items[0].image == in_root
    in_images = touch(tmp_path / "images/S/1.jpg")
    assert read(tmp_path).items[0].image == in_images
    elsewhere = touch(tmp_path / "else/S/1.jpg")
    assert read(tmp_path, images_root=tmp_path / "else").items[0].image == elsewhere
    eval_set = read(tmp_path, images_root=tmp_path / "empty")
    assert eval_set.lines(eval_set.findings) == [
        f"S/test-00000-of-00001.parquet:row 0: image 'S/1.jpg' not found under {tmp_path / 'empty'}"
    ]


def test_max_queries_leaves_out_the_items_of_the_rest(tmp_path: Path) -> None:
    write_set(tmp_path, "S", [text_row(), text_row(qry_text="later")])
    eval_set = read(tmp_path, max_queries=1)
    assert len(eval_set.queries) == 1
    assert EvalItem("later") not in eval_set.items


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qry_img_path": "gone.jpg", "qry_text": "<|image_1|>\n"},
            "S/test-00000-of-00001.parquet:row 0: image 'gone.jpg' not found under",
        ),
        ({"qry_img_path": "../up.jpg", "qry_text": "<|image_1|>\n"}, "row 0: image path '../up.jpg' leaves"),
        (
            {"qry_img_path": "/etc/a.jpg", "qry_text": "<|image_1|>\n"},
            "row 0: image path '/etc/a.jpg' leaves",
        ),
        (
            {"qry_img_path": "/9j/4AAQSkZJRg" * 400, "qry_text": "<|image_1|>\n"},
            "row 0: image path '/9j/4AAQSkZJRg/9j/",
        ),
        (
            {"qry_img_path": "iVBORw0KGgo" * 400, "qry_text": "<|image_1|>\n"},
            "cannot be read under {root}/images: File name too long",
        ),
        (
            {"qry_img_path": "here.jpg", "qry_text": "no place"},
            "row 0: qry_text: <|image_1|> appears 0 times",
        ),
        ({"qry_img_path": "here.jpg", "qry_text": "<|image_1|><|image_1|>"}, "<|image_1|> appears 2 times"),
        ({"qry_text": "<|image_1|>\n"}, "row 0: qry_text: it is empty and there is no image"),
        ({"tgt_text": ["a", ""]}, "row 0: tgt_text: it is empty and there is no image"),
        ({"tgt_text": ["", "a"]}, "row 0: tgt_text: it is empty and there is no image"),
    ],
)
def test_unusable_item_is_named_with_set_file_and_row(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    touch(tmp_path / "here.jpg")
    (tmp_path / "images").mkdir()
    write_set(tmp_path, "S", [text_row(**changes), text_row(**changes)])
    eval_set = read(tmp_path)
    (line,) = eval_set.lines(eval_set.findings)
    assert message.replace("{root}", str(tmp_path)) in line
    assert len(line) < 600, "not the whole of an image that was written into the column"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tgt_text": ["a"], "tgt_img_path": [""]}, "no candidates beside the truth"),
        ({"tgt_text": ["a", "a"]}, "no candidates beside the truth"),
        ({"tgt_text": [], "tgt_img_path": []}, "no candidates beside the truth"),
        ({"tgt_text": None, "tgt_img_path": None}, "no candidates beside the truth"),
        ({"tgt_text": ["a", "b", "c"]}, "tgt_img_path has 2 entries for 3 candidates"),
    ],
)
def test_all_bad_rows_are_refused_with_their_addresses(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_set(tmp_path, "S", [text_row(), text_row(**changes), text_row(), text_row(**changes)])
    with pytest.raises(DataError) as raised:
        read(tmp_path)
    rows = [line for line in str(raised.value).splitlines() if message in line]
    assert [line.split(": ")[0].strip() for line in rows] == [
        f"S/test-00000-of-00001.parquet:row {number}" for number in (1, 3)
    ]


def test_missing_image_is_one_finding_however_many_texts_are_beside_it(tmp_path: Path) -> None:
    rows = [text_row(qry_img_path="gone.jpg", qry_text=f"<|image_1|>\n{number}\n") for number in range(3)]
    write_set(tmp_path, "S", rows)
    eval_set = read(tmp_path)
    (line,) = eval_set.lines(eval_set.findings)
    assert "row 0: image 'gone.jpg' not found" in line
    assert line.endswith("(and 2 more items)")


def test_without_leaves_out_queries_and_candidates_and_counts_them(tmp_path: Path) -> None:
    rows = [
        text_row(qry_text="q0", tgt_text=["a", "b", "c"], tgt_img_path=None),
        text_row(qry_text="q1", tgt_text=["b", "a", "c"], tgt_img_path=None),
        text_row(qry_text="q2", tgt_text=["a", "c"], tgt_img_path=None),
        text_row(qry_text="q3", tgt_text=["c", "b"], tgt_img_path=None),
    ]
    write_set(tmp_path, "S", rows)
    whole = read(tmp_path)
    position = {item.text: index for index, item in enumerate(whole.items)}

    left = whole.without({position["b"]})  # a truth, the only other candidate, one candidate of two
    assert [whole.items[query].text for query in left.queries] == ["q0", "q2"]
    assert [[whole.items[item].text for item in row] for row in left.candidates] == [["a", "c"], ["a", "c"]]
    assert (left.num_queries_left_out, left.num_candidates_left_out) == (2, 1)

    left = left.without({position["q0"]})
    assert [whole.items[query].text for query in left.queries] == ["q2"]
    assert (left.num_queries_left_out, left.num_candidates_left_out) == (3, 1)
    assert {whole.items[index].text for index in left.used} == {"q2", "a", "c"}
    assert whole.without({position["a"], position["c"]}).used == ()


def test_missing_part_of_a_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "S", [text_row()])
    (tmp_path / "S/test-00000-of-00001.parquet").rename(tmp_path / "S/test-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"S/test: 1 of 2 parts missing: -00001-of-00002"):
        read(tmp_path)


def test_part_copied_over_another_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "S", [text_row()])
    whole = tmp_path / "S/test-00000-of-00001.parquet"
    for number in range(2):
        shutil.copy(whole, tmp_path / f"S/test-0000{number}-of-00002.parquet")
    whole.unlink()
    with pytest.raises(DataError, match=r"00001-of-00002.parquet: has the same bytes as test-00000-of-0000"):
        read(tmp_path)


def test_empty_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "S", [text_row()])
    path = tmp_path / "S/test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match=r"S: no rows"):
        read(tmp_path)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large_string": pa.dictionary(pa.int8(), pa.large_string()),
}
LISTS = {"list": pa.list_, "large_list": pa.large_list, "fixed": lambda kind: pa.list_(kind, 2)}


def write_typed(root: Path, **columns: pa.Array) -> None:
    row = text_row()
    arrays = {name: columns.get(name, pa.array([row[name]])) for name in row}
    (root / "S").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), root / "S/test.parquet")


@pytest.mark.parametrize("kind", TEXTS.values(), ids=TEXTS)
def test_text_columns_of_every_kind_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    write_typed(tmp_path, qry_text=pa.array(["q"]).cast(kind), qry_img_path=pa.array([None]).cast(kind))
    assert read(tmp_path).items == (EvalItem("q"), EvalItem("a"), EvalItem("b"))


@pytest.mark.parametrize("make_list", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("name", ["string", "large_string", "dictionary"])
def test_lists_of_texts_of_every_kind_are_read(
    tmp_path: Path, make_list: Callable[[pa.DataType], pa.DataType], name: str
) -> None:
    texts = _list_of(make_list, pa.array(["a", "b"]).cast(TEXTS[name]))
    write_typed(tmp_path, tgt_text=texts)
    assert read(tmp_path).items == (EvalItem("q"), EvalItem("a"), EvalItem("b"))


def _list_of(make_list: Callable[[pa.DataType], pa.DataType], values: pa.Array) -> pa.Array:
    kind = make_list(values.type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(values, 2)
    maker = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
    return maker.from_arrays([0, len(values)], values)


def test_image_structs_are_read_from_their_bytes_and_else_by_their_path(tmp_path: Path) -> None:
    by_path = touch(tmp_path / "images/b.png")
    targets = [{"bytes": b"one", "path": "x.png"}, {"bytes": None, "path": "b.png"}]
    write_typed(
        tmp_path,
        qry_text=pa.array(["<|image_1|>\n"]),
        qry_img_path=pa.array([{"bytes": b"one", "path": None}], IMAGE),
        tgt_text=pa.array([None], pa.string()),
        tgt_img_path=pa.array([targets], pa.list_(IMAGE)),
    )
    eval_set = read(tmp_path)
    query, first, second = eval_set.items
    assert query == EvalItem("<|image_1|>\n", EmbeddedImage(b"one", name="bytes in the table"))
    assert isinstance(first.image, EmbeddedImage)
    assert (first.image, first.image.name) == (query.image, "x.png")  # equal bytes are one image
    assert second.image == by_path
    assert eval_set.findings == {}


def test_struct_without_bytes_and_path_is_no_image(tmp_path: Path) -> None:
    nothing = [{"bytes": None, "path": None}, None]
    for value in nothing:
        write_typed(tmp_path, qry_img_path=pa.array([value], IMAGE))
        assert read(tmp_path).items[0] == EvalItem("q")


WRONG = {
    "number as text": ("qry_text", pa.array([5]), "int64"),
    "fraction as text": ("qry_text", pa.array([0.5]), "double"),
    "truth value as text": ("qry_text", pa.array([True]), "bool"),
    "bytes as text": ("qry_text", pa.array([b"q"]), "binary"),
    "list as query": ("qry_text", pa.array([["a"]]), "list"),
    "image struct as text": ("qry_text", pa.array([{"bytes": b"", "path": ""}], IMAGE), "struct"),
    "categorical of numbers": ("qry_text", pa.array([5]).dictionary_encode(), "int64"),
    "whole numbers as targets": ("tgt_text", pa.array([[3, 7]]), "list<element: int64>"),
    "lists in a list": ("tgt_text", pa.array([[["a"], ["b"]]]), "list"),
    "number as image": ("qry_img_path", pa.array([5]), "int64"),
    "list as query image": ("qry_img_path", pa.array([["a.png"]]), "list"),
    "bare bytes as image": ("qry_img_path", pa.array([b"x"]), "binary"),
    "other struct as image": ("qry_img_path", pa.array([{"path": "a.png"}]), "struct"),
    "other structs as images": ("tgt_img_path", pa.array([[{"url": "a"}, {"url": "b"}]]), "list"),
}


@pytest.mark.parametrize(("column", "values", "found"), WRONG.values(), ids=WRONG)
def test_other_column_types_are_refused_with_file_column_and_row(
    tmp_path: Path, column: str, values: pa.Array, found: str
) -> None:
    write_typed(tmp_path, **{column: values})
    with pytest.raises(
        DataError, match=rf"S/test.parquet:row 0: column {column} holds .* \({found}"
    ) as raised:
        read(tmp_path)
    assert "it must be " in str(raised.value)


def test_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    row = text_row()
    names = [*row, "qry_text"]
    (tmp_path / "S").mkdir()
    pq.write_table(pa.table([pa.array([row[name]]) for name in names], names=names), tmp_path / "S/t.parquet")
    with pytest.raises(DataError, match=r"S/t.parquet: column qry_text is there twice"):
        read(tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    write_typed(tmp_path, qry_text=broken)
    with pytest.raises(DataError, match=r"S/test.parquet: not a readable parquet file: 'utf-8'"):
        read(tmp_path)


def test_missing_columns_and_unreadable_files_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, "S", [{"qry_text": "q", "tgt_text": ["a", "b"]}])
    with pytest.raises(
        DataError, match=r"missing columns qry_img_path, tgt_img_path; found qry_text, tgt_text"
    ):
        read(tmp_path)
    write_set(tmp_path, "I", [{**text_row(), "qry_inst": "x"}])
    with pytest.raises(DataError, match="missing columns tgt_inst"):
        read(tmp_path, "I")
    (tmp_path / "B").mkdir()
    (tmp_path / "B/x.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"B/x.parquet: not a readable parquet file"):
        read(tmp_path, "B")
