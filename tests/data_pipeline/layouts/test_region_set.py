"""Region sets: every layout that training reads, boxes that are wrong in themselves or beyond their image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from agff.errors import DataError
from data_pipeline.layouts.region_set import RegionSet, find_region_sets, read_region_set
from tests.data_pipeline.layouts.test_refcoco import INSTANCES, REFS, write_refs

ROWS = [
    {
        "image": "a.png",
        "regions": [
            {"box": [0, 0, 4, 4], "phrase": "left"},
            {"box": [4, 0, 8, 4], "phrase": "right"},
            {"box": [0, 0, 4, 4], "phrase": "the left one"},
        ],
    },
    {"image": "b.png", "regions": [{"box": [1.5, 0, 3, 2], "phrase": "left"}]},
]


def write_regions(folder: Path, rows: list[dict[str, Any]], *, kind: str = "json") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 4), "red").save(folder / "images" / name)
    if kind == "json":
        (folder / "regions.json").write_text(json.dumps(rows))
        return folder
    if kind == "jsonl":
        (folder / "regions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder
    box = pa.list_(pa.float64())
    regions = pa.list_(pa.struct([("box", box), ("phrase", pa.string())]))
    image: Any = pa.string()
    if kind == "bytes":
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [
            {**row, "image": {"bytes": (folder / "images" / row["image"]).read_bytes(), "path": row["image"]}}
            for row in rows
        ]
        rows[1]["image"]["bytes"] += b"another file"
    schema = pa.schema([("image", image), ("regions", regions)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "test.parquet")
    return folder


def read(folder: Path) -> RegionSet:
    (source,) = find_region_sets(folder)
    return read_region_set(source)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "bytes"])
def test_regions_are_listed_once_with_all_their_phrases(tmp_path: Path, kind: str) -> None:
    found = read(write_regions(tmp_path / "S", ROWS, kind=kind))
    described = [
        (
            found.items[text].text,
            Path(found.items[found.regions[region][0]].name).name,
            found.regions[region][1],
        )
        for text, region in found.phrases
    ]
    assert described == [
        ("left", "a.png", (0, 0, 4, 4)),
        ("right", "a.png", (4, 0, 8, 4)),
        ("the left one", "a.png", (0, 0, 4, 4)),
        ("left", "b.png", (1.5, 0, 3, 2)),
    ]
    assert (found.name, len(found.regions), len(found.used)) == ("S", 3, 5)
    assert not found.findings


def test_regions_are_gone_through_once_for_all_images(tmp_path: Path) -> None:
    class Counted(tuple[Any, ...]):
        num_passes = 0

        def __iter__(self) -> Iterator[Any]:
            Counted.num_passes += 1
            return super().__iter__()

    found = read(write_regions(tmp_path / "S", ROWS))
    images = [image for image, _ in found.regions]
    found = replace(found, regions=Counted(found.regions))
    assert [found.misfit(image, (100, 100)) for image in images] == [None, None, None]
    assert Counted.num_passes == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"box": [0, 0, 4], "phrase": "x"}, "must be four numbers"),
        ({"box": [0, 0, 4, None], "phrase": "x"}, "must be four numbers"),
        ({"box": [0, 0, 4, float("nan")], "phrase": "x"}, "must be four numbers"),
        ({"box": [0, 0, True, 4], "phrase": "x"}, "must be four numbers"),
        ({"box": "0 0 4 4", "phrase": "x"}, "must be four numbers"),
        ({"box": [0, 0, 4, 4], "phrase": " "}, "phrase ' ' must be a text"),
        ({"box": [0, 0, 4, 4]}, "phrase None must be a text"),
        ({"phrase": "x"}, "box None must be four numbers"),
        (3, "box None must be four numbers"),
    ],
)
def test_wrong_region_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    rows = [ROWS[0], {"image": "b.png", "regions": [ROWS[1]["regions"][0], entry]}]
    with pytest.raises(DataError, match=r"S/regions.json:row 1: region 1: .*" + message):
        read(write_regions(tmp_path / "S", rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "regions.json: damaged or cut short"),
        ("{}", "regions.json: a row must have image and regions"),
        ('[{"image": "a.png"}]', "regions.json: a row must have image and regions"),
        ('[{"image": 3, "regions": [3]}]', "regions.json:row 0: image 3 must be a path"),
        (
            '[{"image": "a.png", "regions": []}]',
            r"row 0: regions \[\] must be a list with at least",
        ),
        ('[{"image": "../a.png", "regions": [3]}]', "row 0: image: image path '../a.png' leaves the folder"),
        ("[3]", "regions.json: byte 1: '3]' where an object must begin"),
        ("[]", "regions.json: a row must have image and regions"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "regions.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_parquet_without_its_columns_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a"], "boxes": [1]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="a row must have image and regions"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([-1, 0, 4, 4], r"box \(-1, 0, 4, 4\) is outside of its image of 8 x 4 pixels"),
        ([0, 0, 9, 4], "is outside"),
        ([0, 0, 8, 5], "is outside"),
        ([100, 100, 120, 120], "is outside"),
        ([4, 0, 2, 4], "ends before it begins; it must be x0, y0, x1, y1"),
        ([0, 0, 0, 4], "has no area"),
    ],
)
def test_box_that_is_no_part_of_its_image_is_a_finding_of_the_image(
    tmp_path: Path, box: list[int], problem: str
) -> None:
    rows = [ROWS[0], {"image": "b.png", "regions": [{"box": box, "phrase": "x"}]}]
    found = read(write_regions(tmp_path / "S", rows))
    first, second = (image for image, _ in found.regions[1:])
    assert found.misfit(first, (8, 4)) is None
    assert re.search(problem, found.misfit(second, (8, 4)) or "")


def test_box_is_cut_at_the_rim_as_training_does(tmp_path: Path) -> None:
    """Annotations are rounded: half a pixel outside is inside."""
    rows = [ROWS[0], {"image": "b.png", "regions": [{"box": [-0.5, 0, 8.4, 4.5], "phrase": "x"}]}]
    found = read(write_regions(tmp_path / "S", rows))
    image, box = found.regions[-1]
    assert found.misfit(image, (8, 4)) is None
    item = replace(found.items[image], box=box)
    assert item.load({}).box == item.outline().box == (0, 0, 8, 4)


def test_boxes_of_another_size_of_the_image_are_named(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "width": 16, "height": 8}, ROWS[1]]
    found = read(write_regions(tmp_path / "S", rows))
    (image, _), *_ = found.regions
    assert "has 8 x 4 pixels, its boxes are of one of 16 x 8" in (found.misfit(image, (8, 4)) or "")
    assert found.misfit(image, (16, 8)) is None


def test_visual_genome_is_read(tmp_path: Path) -> None:
    regions = [{"region_id": 5, "x": 1, "y": 0, "width": 3, "height": 2, "phrase": word} for word in "ab"]
    (tmp_path / "region_descriptions.json").write_text(
        json.dumps([{"id": number, "regions": regions} for number in (1, 2)])
    )
    (tmp_path / "VG_100K").mkdir()
    for number in (1, 2):
        Image.new("RGB", (8, 4)).save(tmp_path / f"VG_100K/{number}.jpg")
    found = read(tmp_path)
    assert [box for _, box in found.regions] == [(1, 0, 4, 2)] * 2
    assert (len(found.phrases), dict(found.findings)) == (4, {})


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json", "refs.parquet"])
def test_every_split_of_refcoco_but_the_training_is_a_set(tmp_path: Path, name: str) -> None:
    more = [{**ref, "ann_id": 1, "image_id": 7} for ref in REFS if ref["split"] != "train"]
    write_refs(tmp_path / "refcoco", [*REFS, *more], name, INSTANCES)
    sources = find_region_sets(tmp_path)
    assert [source.name for source in sources] == ["refcoco testA", "refcoco val"]
    found = read_region_set(sources[0])
    assert [found.items[text].text for text, _ in found.phrases] == ["all of it", "all of it"]
    assert len(found.regions) == 2
    assert set(found.sizes.values()) == {(640, 480), (100, 50)}


def gone_from(found: RegionSet, *texts: str) -> RegionSet:
    return found.without({index for index, item in enumerate(found.items) if item.text in texts})


def test_regions_without_image_or_phrase_are_left_out_and_counted(tmp_path: Path) -> None:
    found = read(write_regions(tmp_path / "S", ROWS))
    less = gone_from(found, "right")
    assert [box for _, box in less.regions] == [(0, 0, 4, 4), (1.5, 0, 3, 2)]
    assert [(less.items[text].text, region) for text, region in less.phrases] == [
        ("left", 0),
        ("the left one", 0),
        ("left", 1),
    ]
    assert (less.num_regions_left_out, less.num_phrases_left_out) == (1, 1)
    less = gone_from(found, "the left one")
    assert (less.num_regions_left_out, less.num_phrases_left_out) == (0, 1)
    nothing = found.without({found.regions[0][0]})
    assert (nothing.used, nothing.num_regions_left_out, nothing.num_phrases_left_out) == ((), 3, 3)


def test_sets_are_found_in_a_folder_or_its_folders(tmp_path: Path) -> None:
    write_regions(tmp_path / "A", ROWS)
    write_regions(tmp_path / "B", ROWS, kind="parquet")
    assert [source.folder for source in find_region_sets(tmp_path)] == [tmp_path / "A", tmp_path / "B"]
    assert [source.folder for source in find_region_sets(tmp_path / "A")] == [tmp_path / "A"]
    with pytest.raises(DataError, match="holds no region set"):
        find_region_sets(tmp_path / "A/images")
    with pytest.raises(DataError, match="no such folder"):
        find_region_sets(tmp_path / "C")


@pytest.mark.parametrize(
    "image",
    [{"bytes": "abc", "path": None}, ["a.png"], {"bytes": None, "path": 3}],
    ids=["bytes as text", "a list", "a number"],
)
def test_images_of_another_kind_are_named(tmp_path: Path, image: Any) -> None:
    rows = [{"image": image, "regions": ROWS[1]["regions"]}, ROWS[0]]
    with pytest.raises(DataError, match=r"regions.json:row 0: image .* must be a path or \{bytes, path\}"):
        read(write_regions(tmp_path / "S", rows))


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), True, "8"])
def test_a_box_of_what_is_no_finite_number_is_named(tmp_path: Path, value: Any) -> None:
    rows = [{"image": "a.png", "regions": [{"box": [0, 0, value, 4], "phrase": "x"}]}, ROWS[1]]
    with pytest.raises(DataError, match=r"region 0: box .* must be four numbers"):
        read(write_regions(tmp_path / "S", rows))


@pytest.mark.parametrize("name", ["image", "regions"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    path = write_regions(tmp_path / "S", ROWS, kind="parquet") / "test.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column(name, table.column(name)), path)
    with pytest.raises(DataError, match=f"column {name} is there twice"):
        read(tmp_path / "S")
