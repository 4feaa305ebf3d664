from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agff.errors import DataError
from data_pipeline.layouts.image_regions import ImageRegions
from data_pipeline.layouts.training_rows import Region, RegionRow
from tests.data_pipeline.layouts.test_refcoco import REFS, write_refs

ROWS: list[dict[str, Any]] = [
    {
        "image": "a b.png",
        "width": 8,
        "height": 6,
        "regions": [{"box": [0, 0, 4, 4], "phrase": " a cat "}, {"box": [1.5, 2, 8, 6], "phrase": "a dog"}],
    },
    {"image": "sub/c.png", "width": None, "height": None, "regions": [{"box": [0, 0, 1, 1], "phrase": "x"}]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> ImageRegions:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return ImageRegions(root=path, images=path.parent / "images", name="regions")


def all_rows(layout: ImageRegions) -> list[RegionRow | str]:
    return list(layout.rows("regions", start=0, stop=layout.count_rows("regions")))


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.parquet"])
def test_a_row_is_an_image_and_its_regions(tmp_path: Path, name: str) -> None:
    layout = write(tmp_path / name, ROWS)
    regions = (
        Region(box=(0.0, 0.0, 4.0, 4.0), phrase="a cat"),
        Region(box=(1.5, 2.0, 8.0, 6.0), phrase="a dog"),
    )
    first = RegionRow(image=tmp_path / "images/a b.png", regions=regions, size=(8, 6))
    second = RegionRow(
        image=tmp_path / "images/sub/c.png", regions=(Region(box=(0.0, 0.0, 1.0, 1.0), phrase="x"),)
    )
    assert all_rows(layout) == [first, second]
    assert list(layout.rows("regions", start=1, stop=2)) == [second]
    assert layout.tables("regions") == [tmp_path / name]


def test_visual_genome_s_boxes_have_a_width_and_its_images_are_in_two_folders(tmp_path: Path) -> None:
    for folder, number in (("VG_100K", 1), ("VG_100K_2", 2), (".", 3)):
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/{folder}/{number}.jpg").touch()
    rows = [
        {
            "id": number,
            "regions": [
                {
                    "region_id": 10 * number,
                    "image_id": number,
                    "x": 1,
                    "y": 2,
                    "width": 3,
                    "height": 4,
                    "phrase": "p",
                }
            ],
        }
        for number in (1, 2, 3, 4)
    ]
    found = all_rows(write(tmp_path / "region_descriptions.json", rows))
    assert all(
        isinstance(row, RegionRow) and row.regions[0] == Region(box=(1, 2, 4, 6), phrase="p") for row in found
    )
    paths = [
        row.image.relative_to(tmp_path / "images").as_posix() for row in found if isinstance(row, RegionRow)
    ]
    assert paths == ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "3.jpg", "4.jpg"]
    rows[0]["regions"] = [{"region_id": 5, "x": 1, "y": 2, "width": None, "height": 4, "phrase": "p"}]
    (row, *_) = all_rows(write(tmp_path / "other.json", rows))
    assert isinstance(row, RegionRow)
    assert row.regions == ("region 5: box [1, 2, None, 4] must be four numbers, x0, y0, x1, y1",)


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json", "refs.parquet"])
def test_refcoco_is_recognised_by_its_fields(tmp_path: Path, name: str) -> None:
    path = write_refs(tmp_path / "refcoco", REFS, name)
    layout = ImageRegions(root=path, images=tmp_path, name="regions")
    first, second = all_rows(layout)
    assert isinstance(first, RegionRow)
    assert isinstance(second, RegionRow)
    assert (len(first.regions), len(second.regions)) == (3, 1)
    assert layout.tables("regions") == [path, path.parent / "instances.json"]
    only_tests = [{**ref, "split": "testB"} for ref in REFS]
    layout = ImageRegions(root=write_refs(tmp_path / "b", only_tests, name), images=tmp_path, name="regions")
    with pytest.raises(DataError, match=r"no rows of split train"):
        layout.count_rows("regions")


BAD_REGIONS = [
    ([0, 0, 1], "p", r"box \[0, 0, 1\] must be four numbers, x0, y0, x1, y1"),
    ([0, 0, 1, "1"], "p", "must be four numbers"),
    ([0, 0, 1, True], "p", "must be four numbers"),
    ([0, 0, 1, float("nan")], "p", "must be four numbers"),
    (None, "p", "box None must be four numbers"),
    ([0, 0, 1, 1], "", "phrase '' must be a text that is not empty"),
    ([0, 0, 1, 1], None, "phrase None must be a text"),
    ([0, 0, 1, 1], "a <|image_1|>", "appears 1 times in text"),
]


def test_a_region_that_is_none_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    regions: list[Any] = [{"box": box, "phrase": phrase} for box, phrase, _ in BAD_REGIONS]
    good = {"box": [0, 0, 1, 1], "phrase": "good"}
    (row,) = all_rows(write(tmp_path / "r.json", [{"image": "a.png", "regions": [*regions, "text", good]}]))
    assert isinstance(row, RegionRow)
    assert row.regions[-1] == Region(box=(0, 0, 1, 1), phrase="good")
    expected = [*(message for *_, message in BAD_REGIONS), "box None must be four numbers"]
    for number, (found, message) in enumerate(zip(row.regions[:-1], expected, strict=True)):
        assert isinstance(found, str)
        assert found.startswith(f"region {number}: ")
        assert re.search(message, found)


def test_a_row_without_an_image_or_regions_is_rejected(tmp_path: Path) -> None:
    good = [{"box": [0, 0, 1, 1], "phrase": "good"}]
    rows = [
        {"image": "../a.png", "regions": good},
        {"image": None, "regions": good},
        {"image": "a.png", "regions": []},
        {"image": "a.png", "regions": None},
        {"image": "a.png", "regions": good, "width": 3.5, "height": 2},
        {"image": "a.png", "regions": good, "width": 3},
    ]
    assert all_rows(write(tmp_path / "r.json", rows)) == [
        "image: image path '../a.png' leaves the folder of the images",
        "image None must be a path or {bytes, path}",
        "regions [] must be a list with at least one region",
        "regions None must be a list with at least one region",
        "width 3.5 and height 2 must be whole numbers of pixels",
        "width 3 and height None must be whole numbers of pixels",
    ]


@pytest.mark.parametrize("name", ["r.json", "r.parquet"])
def test_rows_of_another_kind_are_refused(tmp_path: Path, name: str) -> None:
    layout = write(tmp_path / name, [{"picture": "a", "boxes": [1]}])
    with pytest.raises(DataError, match=r"a row must have image and regions, .* found boxes, picture"):
        layout.count_rows("regions")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: "):
        ImageRegions(root=tmp_path / name, images=tmp_path, name="r").count_rows("r")


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), True, None, "1"])
def test_a_box_of_what_is_no_finite_number_is_left_out(tmp_path: Path, value: Any) -> None:
    regions = [{"box": [0, 0, value, 1], "phrase": "x"}, {"box": [0, 0, 1, 1], "phrase": "y"}]
    (row,) = all_rows(write(tmp_path / "r.json", [{"image": "a.png", "regions": regions}]))
    assert isinstance(row, RegionRow)
    wrong, right = row.regions
    assert "must be four numbers" in str(wrong)
    assert right == Region(box=(0.0, 0.0, 1.0, 1.0), phrase="y")


@pytest.mark.parametrize("number", ["../a", True, -1, 10**300, 1.0, None])
def test_a_number_that_names_no_image_of_visual_genome_rejects_its_row_alone(
    tmp_path: Path, number: Any
) -> None:
    region = {"x": 0, "y": 0, "width": 1, "height": 1, "phrase": "x"}
    rows = all_rows(write(tmp_path / "r.json", [{"id": n, "regions": [region]} for n in (number, 1)]))
    assert "must be the number of an image" in str(rows[0])
    assert isinstance(rows[1], RegionRow)


@pytest.mark.parametrize("name", ["image", "regions"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "r.parquet", ROWS)
    table = pq.read_table(tmp_path / "r.parquet")
    pq.write_table(table.append_column(name, table.column(name)), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=f"column {name} is there twice"):
        all_rows(ImageRegions(root=tmp_path / "r.parquet", images=tmp_path, name="regions"))
