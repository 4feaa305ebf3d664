"""Rendering, hold-outs and the three layouts, on coloured squares instead of downloaded drawings."""

import csv
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.layouts.caption_tables import read_caption_tables
from launcher.quickstart import wording
from launcher.quickstart.concepts import STUDIOS, Concept
from launcher.quickstart.eval_sets import eval_sets, truth_first, write_eval_sets
from launcher.quickstart.family_sets import write_family_sets
from launcher.quickstart.layouts import BARE_IMAGE, IMAGE_TARGET, EvalRow
from launcher.quickstart.mmvp_pairs import choose_pairs, load_concept_pairs, write_mmvp_set
from launcher.quickstart.render import Drawing, distinct_indices, png_bytes, render_studio, render_svg, svg_of
from launcher.quickstart.sheet_sets import NUM_SHEETS, sheets_of, write_sheet_sets
from launcher.quickstart.sheets import make_sheets
from launcher.quickstart.train_sets import SUBSETS, is_trained_on, write_train_sets

LEFT_RED = '<path fill="#f00" d="M0 0h5v10H0z"/>'
ICONS = {
    "width": 10,
    "height": 10,
    "icons": {"left": {"body": LEFT_RED}, "blank": {"body": ""}, "again": {"body": LEFT_RED}},
    "aliases": {"right": {"parent": "left", "hFlip": True}, "back": {"parent": "right", "hFlip": True}},
}
NAMES = [
    "red heart",
    "blue heart",
    "one o’clock",  # noqa: RUF001
    "two o’clock",  # noqa: RUF001
    "grinning face",
    "pizza",
    "pear",
    "woman running",
]
NAMES += [f"thing {i}" for i in range(40)]


def make_concept(name: str) -> Concept:
    group = "People & Body" if "woman" in name else "Symbols"
    index = NAMES.index(name)
    return Concept(
        emoji=chr(0x1F300 + index), name=name, group=group, keywords=("one", "two", "three", "four", "five")
    )


def make_drawings(names: Sequence[str] = NAMES) -> list[Drawing]:
    """Every concept by every studio, each in a colour of its own."""
    rng = random.Random(0)
    return [
        Drawing(
            concept=make_concept(name),
            studio=studio.name,
            png=png_bytes(Image.new("RGB", (28, 28), tuple(rng.randrange(256) for _ in range(3)))),
        )
        for studio in STUDIOS
        for name in names
    ]


def test_drawing_is_on_white_and_aliases_are_mirrored() -> None:
    left, right, back = (
        np.asarray(render_svg(svg_of(ICONS, name), size_px=8)) for name in ("left", "right", "back")
    )
    assert left[4, 1].tolist() == [255, 0, 0]
    assert left[4, 6].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(right, left[:, ::-1])
    np.testing.assert_array_equal(back, left)


def test_drawing_that_is_not_square_is_centred() -> None:
    icons = {"icons": {"wide": {"body": '<path fill="#00f" d="M0 0h20v10H0z"/>', "width": 20, "height": 10}}}
    pixels = np.asarray(render_svg(svg_of(icons, "wide"), size_px=8))
    assert pixels.shape == (8, 8, 3)
    assert pixels[0].min() == 255
    assert pixels[4, 4].tolist() == [0, 0, 255]


def test_blank_drawings_and_twins_are_left_out() -> None:
    matched = [
        (make_concept(n), icon) for n, icon in zip(NAMES, ["left", "blank", "again", "right"], strict=False)
    ]
    drawings = render_studio("noto", ICONS, matched, size_px=8)
    assert [drawing.concept.name for drawing in drawings] == [NAMES[0], NAMES[3]]


def test_distinct_indices_equal_the_slow_comparison_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (6, 8, 8, 3))
    noise = rng.integers(-2, 3, (30, 8, 8, 3)) * rng.integers(0, 2, (30, 1, 1, 1))
    pixels = np.clip(base[rng.integers(0, 6, 30)] + noise, 0, 255).astype(np.uint8)
    kept: list[int] = []
    for i in range(30):
        if all(np.abs(pixels[i].astype(float) - pixels[k]).mean() >= 1.0 for k in kept):
            kept.append(i)
    assert 6 < len(kept) < 30
    assert distinct_indices(pixels) == kept


def test_crop_is_on_the_sheet_pixel_for_pixel_and_studios_do_not_mix() -> None:
    sheets = make_sheets(make_drawings(), num_sheets=60, seed=0)
    assert len(sheets) == 60
    for sheet in sheets:
        assert len({cell.studio for cell in sheet.cells}) == 1
        assert len({cell.concept.name for cell in sheet.cells}) == 4
        image = Image.open(io.BytesIO(sheet.png()))
        left, top = 28 * (sheet.truth % 2), 28 * (sheet.truth // 2)
        truth = Image.open(io.BytesIO(sheet.cells[sheet.truth].png))
        assert image.crop((left, top, left + 28, top + 28)).tobytes() == truth.tobytes()
        assert sheet.distractor is not sheet.cells[sheet.truth]
    assert {sheet.by_position for sheet in sheets} == {True, False}
    assert [sheet.png() for sheet in make_sheets(make_drawings(), num_sheets=60, seed=0)] == [
        s.png() for s in sheets
    ]


def test_training_rows_hold_no_held_out_studio_and_no_held_out_concept(tmp_path: Path) -> None:
    drawings = make_drawings()
    counts = write_train_sets(tmp_path, drawings, seed=0)
    allowed = {drawing.file_name for drawing in drawings if is_trained_on(drawing)}
    held_out = {make_concept(name).text for name in NAMES if make_concept(name).is_held_out}
    assert "grinning face" in held_out
    assert set(counts) == set(SUBSETS)
    texts: set[str] = set()
    for subset, num_rows in counts.items():
        table = pq.read_table(tmp_path / subset / "original-00000-of-00001.parquet")
        assert table.num_rows == num_rows > 0
        for row in table.to_pylist():
            texts |= {row["qry"].strip(), row["pos_text"]}
            for column in ("qry_image_path", "pos_image_path", "neg_image_path"):
                path = row.get(column, "")
                assert path == "" or (tmp_path / path).is_file()
                assert path == "" or "sheet_" in path or Path(path).name in allowed
    assert not any(text.endswith(name) for text in texts for name in held_out)
    # the files themselves too: nothing lies about that training could pick up
    on_disk = {path.name for path in tmp_path.rglob("*.png") if not path.name.startswith("sheet_")}
    assert on_disk <= allowed


def test_training_tables_have_mmebs_columns_and_placeholders(tmp_path: Path) -> None:
    write_train_sets(tmp_path, make_drawings(), seed=0)
    columns = ["qry", "qry_image_path", "pos_text", "pos_image_path"]
    for subset in SUBSETS:
        table = pq.read_table(tmp_path / subset / "original-00000-of-00001.parquet")
        assert table.column_names == (
            [*columns, "neg_text", "neg_image_path"] if subset == "EmojiGrounding" else columns
        )
        for row in table.to_pylist():
            for text, path in (("qry", "qry_image_path"), ("pos_text", "pos_image_path")):
                assert row[text].count("<|image_1|>") == (1 if row[path] else 0)
                assert row[path] == "" or row[path].startswith(f"images/{subset}/Train/")
    assert set(json.loads((tmp_path / "meta.json").read_text())) == set(SUBSETS)


def test_evaluation_tables_have_the_truth_first_and_each_candidate_once(tmp_path: Path) -> None:
    counts = write_eval_sets(tmp_path, make_drawings(), seed=0)
    sets = json.loads((tmp_path / "sets.json").read_text())
    assert set(sets) == set(counts)
    assert {entry["meta_task"] for entry in sets.values()} == {
        "retrieval",
        "classification",
        "vqa",
        "grounding",
    }
    for name, num_rows in counts.items():
        table = pq.read_table(tmp_path / name / "test-00000-of-00001.parquet")
        assert table.column_names == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
        assert table.num_rows == num_rows > 0
        for row in table.to_pylist():
            candidates = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
            assert len(set(candidates)) == len(candidates)
            assert all(
                (tmp_path / path).is_file() for path in [row["qry_img_path"], *row["tgt_img_path"]] if path
            )
    rows = pq.read_table(tmp_path / "Emoji_t2i-fxemoji" / "test-00000-of-00001.parquet").to_pylist()
    for row in rows:
        concept = next(c for c in map(make_concept, NAMES) if row["qry_text"] == wording.find_by_name(c.text))
        assert row["tgt_img_path"][0].endswith(f"fxemoji_{concept.hexcode}.png")
        assert len(row["tgt_img_path"]) == len(rows)


def test_evaluation_uses_only_drawings_that_training_never_saw() -> None:
    for eval_set in eval_sets(make_drawings(), seed=0):
        assert eval_set.drawings
        assert not any(is_trained_on(drawing) for drawing in eval_set.drawings), eval_set.name


def test_evaluation_asks_in_the_words_of_training(tmp_path: Path) -> None:
    train, evaluation = tmp_path / "train", tmp_path / "eval"
    write_train_sets(train, make_drawings(), seed=0)
    write_eval_sets(evaluation, make_drawings(), seed=0)

    def instructions(path: Path, column: str) -> set[str]:
        """Queries without the concept's own words."""
        texts = pq.read_table(path)[column].to_pylist()
        phrases = sorted([make_concept(name).text for name in NAMES], key=len, reverse=True)
        phrases += ["top left", "top right", "bottom left", "bottom right"]
        for phrase in phrases:
            texts = [text.replace(phrase, "...") for text in texts]
        return set(texts)

    trained = set().union(*(instructions(path, "qry") for path in train.glob("*/*.parquet")))
    asked = set().union(*(instructions(path, "qry_text") for path in evaluation.glob("*/*.parquet")))
    assert asked <= trained


def test_truth_first_moves_and_loses_nothing() -> None:
    assert truth_first(["a", "b", "c"], "b") == ["b", "a", "c"]


def test_candidates_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 candidate texts, 1 candidate image paths"):
        EvalRow(qry_text="x", tgt_text=["a", "b"], tgt_img_path=[""])


def test_pairs_come_from_one_held_out_studio_and_the_unrelated_one_first() -> None:
    drawings = [d for d in make_drawings() if (d.studio, d.concept.name) != ("fxemoji", "blue heart")]
    wanted = {
        "Color and Appearance": [("red heart", "blue heart")],
        "Texts": [("pizza", "pear"), ("pizza", "absent")],
    }
    pairs = choose_pairs(wanted, drawings)
    assert [pair.statements for pair in pairs] == [("red heart", "blue heart"), ("pizza", "pear")]
    png = {(d.studio, d.concept.name): Image.open(io.BytesIO(d.png)).tobytes() for d in drawings}
    assert [image.tobytes() for image in pairs[0].images] == [
        png["noto-v1", n] for n in ("red heart", "blue heart")
    ]
    assert [image.tobytes() for image in pairs[1].images] == [png["fxemoji", n] for n in ("pizza", "pear")]


def test_mmvp_rows_are_pairs_with_a_jpeg_each(tmp_path: Path) -> None:
    counts = write_mmvp_set(tmp_path, make_drawings())
    with (tmp_path / "Questions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Question ID", "Type", "Statement"]
    assert [int(row["Question ID"]) for row in rows] == list(range(1, 2 * sum(counts.values()) + 1))
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["Type"] == second["Type"]
        assert first["Statement"] != second["Statement"]
    for row in rows:
        path = tmp_path / "MLLM_VLM Images" / row["Type"] / f"{row['Question ID']}.jpg"
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (28, 28))


def test_concept_pairs_are_distinct_and_of_mmvps_nine_patterns() -> None:
    pairs = load_concept_pairs()
    assert len(pairs) == 9
    for pattern, listed in pairs.items():
        assert len(listed) >= 15, pattern
        assert len({frozenset(pair) for pair in listed}) == len(listed)
        assert all(first != second for first, second in listed)


def test_a_sheet_is_found_by_each_of_its_four_names_and_by_no_other(tmp_path: Path) -> None:
    drawings = make_drawings()
    counts = write_sheet_sets(tmp_path, drawings, seed=0)
    png = {(d.studio, d.concept.text): Image.open(io.BytesIO(d.png)).tobytes() for d in drawings}
    trained = {d.concept.text for d in drawings if is_trained_on(d)}
    assert set(counts) == {"EmojiSheets-twemoji", "EmojiSheets-fxemoji"}
    for name, num_sheets in counts.items():
        folder, studio = tmp_path / name, name.removeprefix("EmojiSheets-")
        captions = read_caption_tables(folder, images_root=None)
        assert len(captions.images) == num_sheets > 1
        assert not captions.findings
        assert {captions.items[image].text for image in captions.images} == {BARE_IMAGE}
        names = [captions.items[text].text for text, _ in captions.captions]
        assert len(set(names)) == len(names) == 4 * num_sheets
        assert set(names) <= trained
        for row, (text, image) in enumerate(captions.captions):
            sheet = Image.open(captions.items[image].name)
            left, top = 28 * (row % 2), 28 * (row % 4 // 2)
            cell = sheet.crop((left, top, left + 28, top + 28)).tobytes()
            assert cell == png[studio, captions.items[text].text]
    assert len(sheets_of(drawings * 5, seed=0)) == NUM_SHEETS


def test_image_target_is_mmebs() -> None:
    assert IMAGE_TARGET == "<|image_1|>\nRepresent the given image.\n"


def test_pairs_of_texts_and_described_regions_hold_out_what_training_may_not_see(tmp_path: Path) -> None:
    drawings = make_drawings()
    counts = write_family_sets(tmp_path, drawings, seed=0)
    held_out = {make_concept(name).text for name in NAMES if make_concept(name).is_held_out}
    names = {}
    for part in ("train", "held_out"):
        table = pq.read_table(tmp_path / f"texts/{part}/EmojiTexts/original-00000-of-00001.parquet")
        rows = table.to_pylist()
        assert counts[f"texts/{part}"] == {"EmojiTexts": len(rows)}
        assert all(row["qry_image_path"] == row["pos_image_path"] == "" for row in rows)
        assert {row["pos_text"] for row in rows} == {
            "a photo of one, two, three, four",
            "a photo of two, four",
        }
        names[part] = {row["qry"] for row in rows if not row["qry"].startswith("a photo of")}
    assert names["held_out"] == held_out
    assert names["train"] == {make_concept(name).text for name in NAMES} - held_out
    png = {(d.studio, d.concept.text): Image.open(io.BytesIO(d.png)).tobytes() for d in drawings}
    for part, studios in (("train", set(_TRAINED)), ("held_out", {"fxemoji"})):
        folder = tmp_path / f"regions/{part}/EmojiRegions"
        images = json.loads((folder / "regions.json").read_text())
        assert counts[f"regions/{part}"] == {"EmojiRegions": len(images)}
        for entry in images[:40]:
            sheet = Image.open(folder / entry["image"])
            assert len(entry["regions"]) == 4
            for region in entry["regions"]:
                assert region["phrase"] not in held_out
                found = sheet.crop(tuple(region["box"])).tobytes()
                assert any(png[studio, region["phrase"]] == found for studio in studios)
    folder = tmp_path / "captions/held_out/EmojiCaptions"
    captions = pq.read_table(folder / "test-00000-of-00001.parquet").to_pylist()
    assert counts["captions/held_out"] == {"EmojiCaptions": len(captions)}
    for row in captions:
        found = Image.open(folder / "images" / row["image"]).tobytes()
        assert png["fxemoji", row["text"][0]] == found
    assert {row["text"][0] for row in captions} == names["train"]


_TRAINED = [studio.name for studio in STUDIOS if studio.role == "train"]
