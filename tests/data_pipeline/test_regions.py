"""From files of regions to what a step trains on: one region an image, drawn anew at each step."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.ExifTags import Base

from agff.batch import Batch
from agff.errors import DataError
from data_pipeline import convert as convert_module
from data_pipeline.balance import measure_balance
from data_pipeline.boxes import box_problem
from data_pipeline.collate import FixedRows
from data_pipeline.convert import convert
from data_pipeline.decode import Example, decode
from data_pipeline.layouts.image_regions import ImageRegions
from data_pipeline.loader import StepBatches
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ShardReader
from data_pipeline.regions import content_id
from data_pipeline.storage import LocalFolder
from data_pipeline.vectors import open_vectors
from data_pipeline.vectors_writer import VectorsWriter
from data_pipeline.verify import check_folder
from tests.data_pipeline.test_loader import Encoder
from tests.mmeb import contents

TEXT = "<|image_1|>\nRepresent the given image.\n"


def picture(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """White, with a black region."""
    image = Image.new("RGB", size, "white")
    image.paste("black", box)
    return image


def prepare_regions(folder: Path, rows: list[dict[str, Any]], **choices: int | None) -> Manifest:
    (folder / "r.json").write_text(json.dumps(rows))
    layout = ImageRegions(root=folder / "r.json", images=folder, name="Parts")
    settings: dict[str, Any] = {"rows_per_shard": 4, "max_rows": None, **choices}
    return convert(layout, folder / "out", subsets=None, executor=None, **settings)


def region(x0: float, y0: float, x1: float, y1: float, phrase: str = "p") -> dict[str, Any]:
    return {"box": [x0, y0, x1, y1], "phrase": phrase}


def example_of(folder: Path, manifest: Manifest, sample: int = 0, **choices: Any) -> Example:
    return decode(ShardReader(LocalFolder(folder / "out"), manifest).read("Parts", sample), **choices)


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, Manifest]:
    """10 images of 6 regions each; the phrases of an image are its own but for one that all have."""
    rows = []
    for number in range(10):
        picture((40, 20), (number, 0, number + 1, 1)).save(tmp_path / f"{number}.png")
        own = [region(n, 0, n + 2, 5, f"{number}: {n}") for n in range(5)]
        rows.append({"image": f"{number}.png", "regions": [*own, region(0, 0, 40, 20, "a drawing")]})
    return tmp_path, prepare_regions(tmp_path, rows)


def test_images_inside_of_a_table_become_the_same_shards(many: tuple[Path, Manifest]) -> None:
    folder, manifest = many
    rows = json.loads((folder / "r.json").read_text())
    for row in rows:
        row["image"] = {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]}
    pq.write_table(pa.Table.from_pylist(rows), folder / "r.parquet")
    layout = ImageRegions(root=folder / "r.parquet", images=folder, name="Parts")
    found = convert(layout, folder / "again", subsets=None, executor=None, rows_per_shard=4, max_rows=None)
    assert found.sources["Parts"].num_samples == manifest.sources["Parts"].num_samples == 10
    for number in range(10):
        first, second = (
            ShardReader(LocalFolder(folder / name), each).read("Parts", number)
            for name, each in (("out", manifest), ("again", found))
        )
        assert first.record == second.record
        assert first.images["query"].content == second.images["query"].content


def batches_of(
    many: tuple[Path, Manifest], *, rank: int = 0, world_size: int = 1, **choices: Any
) -> StepBatches:
    folder, manifest = many
    return StepBatches(
        plan=Plan(manifest, Mixture(sub_batch_size=4), seed=choices.pop("seed", 0), global_batch_size=8),
        reader=ShardReader(LocalFolder(folder / "out"), manifest),
        process=Encoder(),
        rank=rank,
        world_size=world_size,
        chunking=FixedRows(rows=4),
        max_bad_in_a_row=20,
        **choices,
    )


def drawn(batches: StepBatches, step: int) -> list[tuple[str, str, Any]]:
    return [(example.address, example.target.text, example.query.box) for example in batches.examples(step)]


def test_an_image_is_stored_once_with_all_its_regions_and_everything_is_verified(
    many: tuple[Path, Manifest],
) -> None:
    folder, manifest = many
    source = manifest.sources["Parts"]
    assert (source.num_rows, source.num_samples, source.num_rejected, source.num_left_out) == (10, 10, 0, 0)
    assert (source.num_regions, source.most_negatives) == (60, 0)
    assert read_manifest(LocalFolder(folder / "out")) == manifest
    assert check_folder(LocalFolder(folder / "out"), manifest, deep=True, processes=1) == []
    raw = ShardReader(LocalFolder(folder / "out"), manifest).read("Parts", 3)
    image = (folder / "3.png").read_bytes()
    assert raw.images["query"].content == image
    assert raw.record["size"] == [40, 20]
    found = [example_of(folder, manifest, 3, draw=lambda count, n=n: n) for n in range(6)]
    assert [example.target.text for example in found] == [*(f"3: {n}" for n in range(5)), "a drawing"]
    for example, stored in zip(found, raw.record["regions"], strict=True):
        assert example.query.box == tuple(stored["box"])
        assert example.query.text == TEXT
        assert example.query.instruction == "Represent the given image."
        assert example.query_id == content_id(TEXT, image, example.query.box)
        assert example.target_id == content_id(example.target.text, None)
    assert len({example.query_id for example in found}) == 6
    assert raw.record["query"]["id"] == content_id(TEXT, image) not in {example.query_id for example in found}


def test_equal_phrases_have_one_id_whatever_image_they_are_of(many: tuple[Path, Manifest]) -> None:
    first, second = (example_of(*many, sample, draw=lambda count: 5) for sample in (0, 1))
    assert first.target_id == second.target_id
    assert first.query_id != second.query_id


def test_which_region_is_drawn_follows_from_seed_step_and_row_alone(many: tuple[Path, Manifest]) -> None:
    whole = batches_of(many)
    assert drawn(whole, 3) == drawn(batches_of(many), 3), "no state"
    for rank in range(2):
        assert drawn(batches_of(many, rank=rank, world_size=2), 3) == drawn(whole, 3)[rank::2]
    seen = [one for step in range(60) for one in drawn(whole, step)]
    for number in range(10):
        texts = Counter(text for address, text, _ in seen if address.endswith(f":{number:09d}"))
        assert len(texts) == 6, "every region has its turn"
        assert max(texts.values()) < sum(texts.values()) / 2
    others = [one for step in range(60) for one in drawn(batches_of(many, seed=1), step)]
    assert others != seen
    batch = whole[0]
    assert isinstance(batch, Batch)
    assert batch.num_pairs == 8


def test_literal_draws_of_a_plan(many: tuple[Path, Manifest]) -> None:
    """numpy promises no stable stream across its versions."""
    plan = batches_of(many).plan
    found = [plan.region(6, step=step, row=row, attempt=0) for step in (0, 1000) for row in range(6)]
    assert found == PINNED
    assert [plan.region(1, step=0, row=row, attempt=0) for row in range(3)] == [0, 0, 0]
    assert len({plan.region(1000, step=0, row=0, attempt=attempt) for attempt in range(5)}) == 5


PINNED = [3, 2, 1, 0, 1, 2, 5, 4, 0, 2, 0, 0]


def test_a_bad_image_is_redrawn_with_a_region_of_its_own(many: tuple[Path, Manifest]) -> None:
    for shard in (many[0] / "out/Parts").glob("*-00000.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"XXXX"))
    first, second = (batches_of(many), batches_of(many))
    found = [first[step] for step in range(4)]
    assert sum(len(batch.skipped) for batch in found if isinstance(batch, Batch)) > 0
    assert [drawn(first, step) for step in range(4)] == [drawn(second, step) for step in range(4)]


BOXES: dict[str, tuple[tuple[float, ...], str | None]] = {
    "whole": ((0, 0, 20, 10), None),
    "inside": ((0.5, 0.25, 1, 1), None),
    "rounded": ((-0.4, 0, 20.5, 10), None),
    "right of it": ((0, 0, 21, 10), r"box \(0, 0, 21, 10\) is outside of its image of 20 x 10 pixels"),
    "left of it": ((-1, 0, 5, 5), "is outside of its image"),
    "below it": ((0, 0, 10, 10.6), "is outside of its image"),
    "of another image": ((300, 200, 400, 260), "is outside of its image"),
    "turned": ((0, 0, 10, 20), "is outside of its image"),
    "no width": ((3, 3, 3, 5), r"box \(3, 3, 3, 5\) has no area"),
    "no height": ((3, 3, 5, 3), "has no area"),
    "only rounding is inside": ((20, 0, 20.4, 5), "has no area"),
    "backwards": ((5, 0, 3, 2), r"box \(5, 0, 3, 2\) ends before it begins; it must be x0, y0, x1, y1"),
    "upside down": ((0, 5, 3, 2), "ends before it begins"),
}


@pytest.mark.parametrize("case", BOXES)
def test_what_a_box_of_an_image_may_be(case: str) -> None:
    (x0, y0, x1, y1), message = BOXES[case]
    found = box_problem((x0, y0, x1, y1), (20, 10))
    assert found is None if message is None else re.search(message, str(found))


def test_regions_that_cannot_be_used_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    picture((20, 10), (0, 0, 1, 1)).save(tmp_path / "a.png")
    bad = [region(*box, case) for case, (box, message) in BOXES.items() if message]
    good = [region(*box, case) for case, (box, message) in BOXES.items() if not message]
    rows = [
        {"image": "a.png", "regions": [*good, *bad, region(0, 0, 1, 1, "")]},
        {"image": "a.png", "regions": bad[:2]},
        {"image": "absent.png", "regions": good},
        {"image": "a.png", "regions": good, "width": 10, "height": 20},
        {"image": "a.png", "regions": good, "width": 20, "height": 10},
    ]
    manifest = prepare_regions(tmp_path, rows)
    source = manifest.sources["Parts"]
    assert (source.num_rows, source.num_samples, source.num_rejected) == (5, 2, 3)
    assert source.num_left_out == len(bad) + 1
    lines = [json.loads(line) for line in (tmp_path / "out/Parts/rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0] * (len(bad) + 1) + [1, 2, 3]
    assert (
        lines[0]["reason"] == "box (0, 0, 21, 10) is outside of its image of 20 x 10 pixels ('right of it')"
    )
    assert "a.png: no region can be used: box (0, 0, 21, 10) is outside" in lines[-3]["reason"]
    assert "; box (-1, 0, 5, 5) is outside" in lines[-3]["reason"]
    assert lines[-2]["reason"].endswith("absent.png: is missing")
    assert lines[-1]["reason"].endswith(
        "a.png: has 20 x 10 pixels, its boxes are of one of 10 x 20; they must be in pixels of the upright "
        "image"
    )
    found = [example_of(tmp_path, manifest, draw=lambda count, n=n: n) for n in range(len(good))]
    assert [example.query.box for example in found] == [(0, 0, 20, 10), (0.5, 0.25, 1, 1), (0, 0, 20, 10)]


def darkness(example: Example) -> tuple[float, float]:
    """Share of black pixels inside and outside of the region."""
    assert example.query.image is not None
    assert example.query.box is not None
    grey = example.query.image.convert("L").point(lambda level: 255 * (level < 128))
    inside = grey.crop(tuple(map(round, example.query.box)))  # type: ignore[arg-type]
    black = inside.histogram()[255]
    rest = grey.width * grey.height - inside.width * inside.height
    return black / (inside.width * inside.height), (grey.histogram()[255] - black) / rest


@pytest.mark.parametrize("seen_pixels", [None, 30_000, 2_500])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_box_follows_an_image_that_is_decoded_smaller_or_turned(
    tmp_path: Path, seen_pixels: int | None, orientation: int
) -> None:
    size, box = ((803, 601), (200, 100, 500, 400)) if orientation == 1 else ((601, 803), (100, 303, 400, 603))
    upright = picture(size, box)
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)
    manifest = prepare_regions(tmp_path, [{"image": "a.jpg", "regions": [region(*box)]}])
    example = example_of(tmp_path, manifest, seen_pixels=seen_pixels)
    assert example.query.image is not None
    is_smaller = example.query.image.size != size
    assert is_smaller == (seen_pixels is not None)
    inside, outside = darkness(example)
    assert inside > 0.97
    assert outside < 0.02


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"box":[0.0,0.0,2.0,5.0]', b'"box":[0.0,0.0,1.0,5.0]', "text or image of the query is not what"),
        (b'"text":"0: 0"', b'"text":"0: 9"', "text or image of the target is not what was written"),
        (b'"box":[0.0,0.0,2.0,5.0]', b'"box":[9.0,0.0,2.0,5.0]', "the query is not what was written"),
        (b'"regions":[{', b'"regionz":[{', "the target is missing"),
        (b'"size":[40,20]', b'"syze":[40,20]', "the regions is not what was written"),
    ],
)
def test_changed_regions_are_found_by_verify(
    many: tuple[Path, Manifest], old: bytes, new: bytes, message: str
) -> None:
    folder, manifest = many
    shard = folder / "out/Parts/Parts-00000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(old, new, 1))
    assert shard.read_bytes() != content
    problems = check_folder(LocalFolder(folder / "out"), manifest, deep=False, processes=1)
    assert any(
        problem.startswith("Parts-00000.tar:000000000: ") and message in problem for problem in problems
    )


@pytest.mark.parametrize(
    "change", [{"regions": []}, {"regions": 3}, {"regions": [{}]}, {"size": [0, 0]}, {"size": "x"}]
)
def test_a_foreign_record_of_regions_is_a_data_error_with_its_address(
    many: tuple[Path, Manifest], change: dict[str, Any]
) -> None:
    folder, manifest = many
    raw = ShardReader(LocalFolder(folder / "out"), manifest).read("Parts", 2)
    broken = type(raw)(address=raw.address, record={**raw.record, **change}, images=raw.images)
    with pytest.raises(DataError, match=r"^Parts-00000.tar:000000002"):
        decode(broken)


def test_a_teacher_s_vectors_are_of_pairs(many: tuple[Path, Manifest], tmp_path: Path) -> None:
    """A vector a sample cannot be that of whichever region a step draws."""
    writer = VectorsWriter(tmp_path / "v", many[1], model="teacher", dim=2, batch_size=2)
    assert writer.missing_blocks(rank=0, world_size=1) == []
    writer.finish()
    with pytest.raises(
        DataError, match=r"Parts has regions, of which each step draws another: .*data.weights"
    ):
        open_vectors(tmp_path / "v", many[1], sources=["Parts"])


def test_the_start_up_table_can_measure_batches_of_regions(many: tuple[Path, Manifest]) -> None:
    batches = batches_of(many)
    measured = measure_balance(
        batches.plan,
        batches.reader,
        Encoder(),
        FixedRows(rows=4),
        world_size=2,
        num_steps=2,
        with_negatives=True,
        limit_s=60,
    )
    assert measured is not None
    assert measured.balance.num_tokens > 2 * 8 * len(TEXT) / 2


def test_shards_of_regions_do_not_depend_on_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        picture((20, 10), (number, 0, 9, 1)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "regions": [region(0, 0, 2, 2), region(0, 0, 99, 2)]} for n in range(9)]
    whole = prepare_regions(tmp_path, rows)
    (tmp_path / "out").rename(tmp_path / "whole")
    right, written = convert_module.write_shard, itertools.count()

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(written) == 1:
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(convert_module, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_regions(tmp_path, rows)
    assert prepare_regions(tmp_path, rows) == whole
    assert whole.sources["Parts"].num_left_out == 9
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
