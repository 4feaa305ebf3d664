from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agff.errors import DataError
from data_pipeline.convert import convert
from data_pipeline.decode import decode
from data_pipeline.layouts.captions import Captions
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder


def write_captions(root: Path, rows: list[dict[str, Any]]) -> Captions:
    """As LLaVA-CC3M-Pretrain-595K is unpacked: metadata.json, images/GCC_train_<id>.jpg."""
    (root / "images").mkdir(parents=True)
    for number, row in enumerate(rows):
        if isinstance(row.get("image"), str) and "/" not in row["image"]:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / "images" / row["image"])
    (root / "metadata.json").write_text(json.dumps(rows))
    return Captions(root=root, images=root / "images", name="CC3M")


def caption(number: int, **values: Any) -> dict[str, Any]:
    name = f"GCC_train_{number:09d}"
    return {
        "id": name,
        "image": f"{name}.jpg",
        "url": "http://",
        "caption": f"raw {number}",
        "blip_caption": f"blip {number}",
        **values,
    }


def test_a_row_is_an_image_with_its_instruction_and_the_better_caption(tmp_path: Path) -> None:
    rows = [
        caption(0),
        caption(1, blip_caption=""),
        caption(2, blip_caption=None),
        caption(3, caption=" x\n"),
    ]
    del rows[3]["blip_caption"]
    layout = write_captions(tmp_path / "cc3m", rows)
    manifest = convert(layout, tmp_path / "out", subsets=None, rows_per_shard=3, max_rows=None, executor=None)
    assert list(manifest.sources) == ["CC3M"]
    reader = ShardReader(LocalFolder(tmp_path / "out"), manifest)
    examples = [decode(reader.read("CC3M", number)) for number in range(4)]
    assert [example.target.text for example in examples] == ["blip 0", "raw 1", "raw 2", "x"]
    for number, example in enumerate(examples):
        assert example.query.text == "<|image_1|>\nRepresent the given image.\n"
        assert example.query.instruction == "Represent the given image."
        assert example.query.image is not None
        assert abs(example.query.image.getpixel((4, 4))[0] - number) < 3
        assert (example.target.instruction, example.target.image) == ("", None)


def test_rows_that_cannot_be_used_are_rejected_with_their_reason(tmp_path: Path) -> None:
    rows = [
        caption(0),
        caption(1, caption="", blip_caption=" "),
        caption(2, image="../out.jpg"),
        caption(3, image=None),
        caption(4, blip_caption=5),
        caption(5, blip_caption="a <|image_1|>"),
        caption(6, image="absent/a.jpg"),
    ]
    layout = write_captions(tmp_path / "cc3m", rows)
    out = tmp_path / "out"
    manifest = convert(layout, out, subsets=None, rows_per_shard=9, max_rows=None, executor=None)
    assert (manifest.sources["CC3M"].num_samples, manifest.sources["CC3M"].num_rejected) == (1, 6)
    reasons = [json.loads(line)["reason"] for line in (out / "CC3M/rejected.jsonl").read_text().splitlines()]
    expected = [
        "caption: blip_caption and caption are empty",
        "image: image path '../out.jpg' leaves the folder of the images",
        "image None must be a path",
        "caption: a text must be a str, found int 5",
        "appears 1 times in text 'a <|image_1|>'; without an image",
        "absent/a.jpg: is missing",
    ]
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "metadata.json: no rows"),
        ([{"id": "a", "conversations": []}], "must have image and blip_caption or caption, found id, conv"),
    ],
)
def test_another_json_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    layout = write_captions(tmp_path / "cc3m", rows)
    with pytest.raises(DataError, match=message):
        layout.count_rows("CC3M")
