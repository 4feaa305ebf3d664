"""MMEB-eval's layout, both variants, and every way it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agff.errors import DataError
from data_pipeline.layouts.mmeb_eval import (
    MMEB_SETS,
    EvalItem,
    EvalSet,
    SetInfo,
    find_eval_sets,
    read_eval_set,
)

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
    assert read(tmp_path).items[0].image_path == in_root
    in_images = touch(tmp_path / "images/S/1.jpg")
    assert read(tmp_path).items[0].image_path == in_images
    elsewhere = touch(tmp_path / "else/S/1.jpg")
    assert read(tmp_path, images_root=tmp_path / "else").items[0].image_path == elsewhere
    with pytest.raises(
        DataError, match=r"'S/1.jpg' not found under .*empty; name the images' folder \(--mmeb_images\)"
    ):
        read(tmp_path, images_root=tmp_path / "empty")


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
            r"S/test-.*:row 0: image 'gone.jpg' not found",
        ),
        ({"qry_img_path": "../up.jpg", "qry_text": "<|image_1|>\n"}, r"row 0: image path '../up.jpg' leaves"),
        (
            {"qry_img_path": "/etc/up.jpg", "qry_text": "<|image_1|>\n"},
            r"row 0: image path '/etc/up.jpg' leaves",
        ),
        (
            {"qry_img_path": "here.jpg", "qry_text": "no place"},
            r"row 0: qry_text: .* appears 0 times in text 'no place'",
        ),
        (
            {"qry_img_path": "here.jpg", "qry_text": "<|image_1|><|image_1|>"},
            r"row 0: qry_text: .* appears 2 times",
        ),
        ({"qry_text": "<|image_1|>\n"}, r"row 0: qry_text is empty and there is no image"),
        ({"tgt_text": ["a"], "tgt_img_path": [""]}, r"row 0: no candidates beside the truth"),
        ({"tgt_text": ["a", "a"]}, r"row 0: no candidates beside the truth"),
        ({"tgt_text": ["a", "b", "c"]}, r"row 0: tgt_img_path has 2 entries for 3 candidates"),
    ],
)
def test_bad_row_is_refused_with_its_address(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    touch(tmp_path / "here.jpg")
    write_set(tmp_path, "S", [text_row(**changes)])
    with pytest.raises(DataError, match=message):
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


def test_built_in_table_is_mmeb_s() -> None:
    assert len(MMEB_SETS) == 36
    assert sum(info.in_distribution for info in MMEB_SETS.values()) == 20
    counts = {
        task: sum(info.meta_task == task for info in MMEB_SETS.values()) for task in ("classification", "vqa")
    }
    assert counts == {"classification": 10, "vqa": 10}
    assert MMEB_SETS["RefCOCO"] == SetInfo(meta_task="grounding", in_distribution=False)


def test_sets_json_describes_sets_of_one_s_own(tmp_path: Path) -> None:
    for name in ("Zebra", "Mine", "GQA"):
        write_set(tmp_path, name, [text_row()])
    sets = {
        "note": "imitates the format",
        "Zebra": {"meta_task": "retrieval", "in_distribution": True, "about": "ignored"},
        "Mine": {"meta_task": "vqa", "in_distribution": False, "note": "its own"},
    }
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    assert find_eval_sets(tmp_path) == {
        "Zebra": SetInfo(meta_task="retrieval", in_distribution=True, note="imitates the format"),
        "Mine": SetInfo(meta_task="vqa", in_distribution=False, note="its own"),
        "GQA": MMEB_SETS["GQA"],
    }
    assert list(find_eval_sets(tmp_path)) == ["Zebra", "Mine", "GQA"]


def test_unknown_sets_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        find_eval_sets(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"found no <SET>/\*.parquet"):
        find_eval_sets(tmp_path)
    write_set(tmp_path, "Mine", [text_row()])
    with pytest.raises(DataError, match=r"Mine: not one of MMEB's 36 sets; describe it in"):
        find_eval_sets(tmp_path)
    (tmp_path / "sets.json").write_text('{"Gone": {"meta_task": "vqa", "in_distribution": true}}')
    with pytest.raises(DataError, match=r"sets.json lists Gone, but there is no Gone/"):
        find_eval_sets(tmp_path)
    for content in ("[1]", "{", '{"Mine": {"meta_task": "vqa"}}', '{"Mine": 3}'):
        (tmp_path / "sets.json").write_text(content)
        with pytest.raises(DataError, match=r"sets.json: expected"):
            find_eval_sets(tmp_path)
