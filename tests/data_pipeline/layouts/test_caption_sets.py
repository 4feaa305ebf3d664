"""The public caption layouts: what is read of each, which are found, and every way they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from data_pipeline.layouts import long_captions
from data_pipeline.layouts.caption_folders import find_caption_sets
from data_pipeline.layouts.caption_set import CaptionSet, reference_set
from data_pipeline.layouts.eval_items import EmbeddedImage
from data_pipeline.layouts.long_captions import SHAREGPT4V_FILE
from data_pipeline.layouts.sugarcrepe import SUBSETS, ChoiceSet
from tests.captions import write_sharegpt4v, write_sugarcrepe, write_tables, write_urban1k


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Three image files."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4), (80 * number, 0, 0)).save(folder / f"{number}.jpg")
    return [str(folder / f"{number}.jpg") for number in range(3)]


def read(root: Path, *, images_root: Path | None = None) -> list[CaptionSet | ChoiceSet]:
    return [reader() for reader in find_caption_sets(root, images_root=images_root, option="--captions")]


def read_one(root: Path) -> CaptionSet:
    (found,) = read(root)
    assert isinstance(found, CaptionSet)
    return found


def pairs_of(captions: CaptionSet) -> list[tuple[str, str]]:
    """(file name of the image, caption)."""
    items = captions.items
    return [(Path(items[image].name).name, items[text].text) for text, image in captions.captions]


FIVE = [f"caption {number}" for number in range(5)]


@pytest.mark.parametrize("in_table", [True, False], ids=["bytes", "paths"])
@pytest.mark.parametrize("num_files", [1, 2])
def test_flickr30k_and_own_tables(tmp_path: Path, images: list[str], in_table: bool, num_files: int) -> None:
    captions = {file: [f"{number} {text}" for text in FIVE] for number, file in enumerate(images)}
    folder = write_tables(tmp_path / "flickr30k_test", captions, in_table=in_table, num_files=num_files)
    found = read_one(folder)
    assert found.name == "Flickr30k"
    assert sorted(pairs_of(found)) == sorted(
        (Path(f).name, t) for f, texts in captions.items() for t in texts
    )
    assert {found.items[image].text for image in found.images} == {MMEB_TEXTS.image_alone}
    assert all(isinstance(found.items[i].image, EmbeddedImage) == in_table for i in found.images)
    assert not found.findings
    assert found.note == (
        "Flickr30k has 3 images and 15 captions here, the published set 1,000 and 5,000: published scores "
        "are not for these."
    )
    own = read_one(write_tables(tmp_path / "mine", captions, in_table=in_table))
    assert (own.name, own.note) == ("mine", None)


def test_of_coco_the_first_five_captions_are_read(tmp_path: Path, images: list[str]) -> None:
    captions = {file: [f"{file} {text}" for text in [*FIVE, "sixth", "seventh"]] for file in images}
    coco = read_one(write_tables(tmp_path / "coco_test", captions))
    assert (coco.name, len(coco.captions)) == ("COCO", 15)
    assert not any(text.endswith(("sixth", "seventh")) for _, text in pairs_of(coco))
    assert len(read_one(write_tables(tmp_path / "own", captions)).captions) == 21


def test_equal_images_are_one_and_equal_captions_one_item(tmp_path: Path, images: list[str]) -> None:
    folder = write_tables(tmp_path / "own", {images[0]: ["a", "same"], images[1]: ["same"]})
    path = folder / "data/test-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    again = {"image": {**rows[0]["image"], "path": "another name.jpg"}, "text": ["b"]}
    pq.write_table(pa.Table.from_pylist([*rows, again]), path)
    found = read_one(folder)
    assert (len(found.images), len(found.texts), len(found.captions)) == (2, 3, 4)
    assert pairs_of(found) == [("0.jpg", "a"), ("0.jpg", "same"), ("1.jpg", "same"), ("0.jpg", "b")]


def test_own_set_may_say_what_is_beside_its_images(tmp_path: Path, images: list[str]) -> None:
    folder = write_tables(tmp_path / "own", {file: ["a"] for file in images})
    values = {"image_text": "<|image_1|>\n", "note": "drawn by us."}
    (folder / "caption_set.json").write_text(json.dumps(values))
    found = read_one(folder)
    assert {found.items[image].text for image in found.images} == {"<|image_1|>\n"}
    assert found.note == "drawn by us."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "caption_set.json: not JSON"),
        ('{"text": "a"}', r"unknown keys \['text'\]; a set has image_text, note"),
        ('{"note": 3}', "with texts, found"),
        ('{"image_text": "an image"}', r"image_text: <\|image_1\|> appears 0 times"),
    ],
)
def test_wrong_description_is_refused(tmp_path: Path, images: list[str], content: str, message: str) -> None:
    folder = write_tables(tmp_path / "own", {file: ["a"] for file in images})
    (folder / "caption_set.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(folder)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [7, 2**20])
def test_sharegpt4v_is_the_first_thousand_rows(
    tmp_path: Path, images: list[str], monkeypatch: pytest.MonkeyPatch, indent: int | None, piece: int
) -> None:
    monkeypatch.setattr(long_captions, "_PIECE", piece)
    monkeypatch.setattr(long_captions, "_NUM_ROWS", 3)
    rows = [(f"coco/{n}.jpg", f'line {n}, "quoted" é\nnext [line]\n') for n in range(3)]
    folder = write_sharegpt4v(tmp_path / "ShareGPT4V", rows, indent=indent)
    path = folder / SHAREGPT4V_FILE
    path.write_text(path.read_text().rstrip("]\n") + ", {broken")  # behind what is read
    found = read_one(folder)
    assert pairs_of(found) == [(f"{n}.jpg", f'line {n}, "quoted" é next [line]') for n in range(3)]
    assert len(found.findings) == 3
    (folder / "data/coco").mkdir(parents=True)
    for n in range(3):
        Image.open(images[n]).save(folder / f"data/coco/{n}.jpg")
    assert not read_one(folder).findings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a list"),
        ("", "expected a list"),
        ('[{"image": "a.jpg"}]', r"row 0: expected \{image, conversations"),
        ('[{"image": 3, "conversations": [{}, {"value": "x"}]}]', "image and value must be texts"),
        ('[{"image": "a.jpg", "conversations": [{"value": "x"}]}]', "row 0: expected"),
        ('[{"image": "a.jpg", "conversa', "row 0 is cut or no JSON"),
        ('[{"image": "a.jpg", "conversations": [{}, {"value": "x"}]}', "cut behind row 0"),
        ("[]", "0 images; retrieval needs at least two"),
    ],
)
def test_wrong_sharegpt4v_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / SHAREGPT4V_FILE).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_urban1k_reads_the_first_line_in_order_of_numbers(tmp_path: Path, images: list[str]) -> None:
    folder = write_urban1k(tmp_path / "Urban1k", {images[0]: ["x"], images[1]: ["y", "more"]})
    for name, source in (("image/10.jpg", images[2]), ("image/9.jpg", images[2])):
        (folder / name).write_bytes(Path(source).read_bytes())
    (folder / "caption/10.txt").write_text("ten\nsecond line")
    (folder / "caption/9.txt").write_text("nine\r\nsecond line")
    found = read_one(folder)
    assert found.name == "Urban1k"
    assert [text for _, text in pairs_of(found)] == ["x", "y", "nine", "ten"]


def test_urban1k_files_without_partner_are_named(tmp_path: Path, images: list[str]) -> None:
    folder = write_urban1k(tmp_path / "u", {file: ["x"] for file in images})
    (folder / "image/1.jpg").unlink()
    (folder / "caption/2.txt").unlink()
    with pytest.raises(DataError, match=r"u/image/2.jpg: no caption/2.txt"):
        read(folder)
    (folder / "image/2.jpg").unlink()
    (folder / "image/4.jpg").write_bytes(b"")
    (folder / "caption/4.txt").write_text("")
    with pytest.raises(DataError, match=r"u/caption/4.txt: no caption"):
        read(folder)
    (folder / "caption/4.txt").write_text("four")
    found = read_one(folder)
    assert list(found.findings.values()) == [f"image 'image/1.jpg' not found under {folder}"]


def test_sugarcrepe_has_seven_subsets_and_images_of_val2017(tmp_path: Path, images: list[str]) -> None:
    choices = [(file, f"right {file}", f"wrong {file}") for file in images]
    (found,) = read(write_sugarcrepe(tmp_path / "sugar", choices))
    assert isinstance(found, ChoiceSet)
    assert (found.name, len(found.choices), len(found.items)) == ("SugarCrepe", 21, 9)
    assert list(dict.fromkeys(choice.subset for choice in found.choices)) == list(SUBSETS)
    assert not found.findings
    for choice in found.choices:
        file = found.items[choice.image].name
        assert found.items[choice.caption].text.endswith(Path(file).name)
        assert found.items[choice.negative].text.startswith("wrong")
    assert "replace_obj 3 (1,652)" in (found.note or "")
    less = found.without({found.choices[0].image})
    assert (len(less.choices), len(less.left_out)) == (14, 7)
    assert found.choices[0].image not in less.used


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": {"filename": "0.jpg", "caption": "a"}}', "add_obj.json:0: expected {filename, caption"),
        ('{"7": {"filename": "0.jpg", "caption": "a", "negative_caption": " "}}', "add_obj.json:7: expected"),
        (
            '{"7": {"filename": "0.jpg", "caption": "a", "negative_caption": "a"}}',
            "add_obj.json:7: caption and negative_caption are both 'a'",
        ),
        ("[]", "expected {key: {filename"),
        ("{", "not JSON"),
        (None, "SugarCrepe without add_obj.json"),
    ],
)
def test_wrong_sugarcrepe_is_named(
    tmp_path: Path, images: list[str], content: str | None, message: str
) -> None:
    folder = write_sugarcrepe(tmp_path / "s", [(images[0], "a", "b")])
    (folder / "add_obj.json").unlink() if content is None else (folder / "add_obj.json").write_text(content)
    with pytest.raises(DataError) as error:
        read(folder)
    assert message in str(error.value)


def write_all(root: Path, images: list[str]) -> None:
    captions = {file: [f"of {file}"] for file in images}
    write_tables(root / "flickr30k", captions)
    write_tables(root / "coco", captions)
    write_sharegpt4v(root / "sharegpt4v", [(f"{n}.jpg", str(n)) for n in range(3)])
    write_urban1k(root / "urban", captions)
    write_sugarcrepe(root / "sugarcrepe", [(file, "a", "b") for file in images])


def test_all_layouts_are_found_in_a_folder_of_folders(tmp_path: Path, images: list[str]) -> None:
    root = tmp_path / "all"
    write_all(root, images)
    (root / "val2017").mkdir()
    Image.open(images[0]).save(root / "val2017/0.jpg")  # images alone are passed over
    assert [found.name for found in read(root)] == [
        "COCO",
        "Flickr30k",
        "ShareGPT4V",
        "SugarCrepe",
        "Urban1k",
    ]


def train_split(root: Path) -> None:
    path = root / "coco/data/test-00000-of-00001.parquet"
    path.rename(path.with_name("train-00000-of-00001.parquet"))


UNKNOWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another split": (train_split, "coco: holds no caption set of a known layout"),
    "another layout": (
        lambda root: ((root / "new").mkdir(), (root / "new/captions.json").write_text("[]")),
        "new: holds no caption set of a known layout",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_layouts_are_refused_with_what_was_expected(
    tmp_path: Path, images: list[str], spoil: Callable[[Path], object], message: str
) -> None:
    root = tmp_path / "all"
    write_all(root, images)
    spoil(root)
    with pytest.raises(DataError) as error:
        read(root)
    assert message in str(error.value)
    for expected in (
        "test*.parquet with the columns image and text",
        SHAREGPT4V_FILE,
        "image/<id>.jpg",
        "SugarC",
    ):
        assert expected in str(error.value)


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no caption set of a known layout"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no such folder \(--captions\)"):
        read(tmp_path / "gone")


def test_rows_without_caption_or_image_are_all_named(tmp_path: Path, images: list[str]) -> None:
    folder = write_tables(tmp_path / "own", {images[0]: [], images[1]: ["a"], images[2]: ["b"]})
    path = folder / "data/test-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError) as error:
        read(folder)
    assert "own/data/test-00000-of-00001.parquet:row 0: no caption" in str(error.value)
    assert "own/data/test-00000-of-00001.parquet:row 1: no image" in str(error.value)


def test_wrong_columns_and_missing_parts_are_named(tmp_path: Path, images: list[str]) -> None:
    folder = write_tables(tmp_path / "own", {file: ["a"] for file in images}, num_files=2)
    (folder / "data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 of 2 parts missing"):
        read(folder)
    path = folder / "data/test.parquet"
    (folder / "data/test-00000-of-00002.parquet").rename(path)
    pq.write_table(pq.read_table(path).rename_columns(["image", "caption"]), path)
    with pytest.raises(DataError, match="missing columns text; found image, caption"):
        read(folder)


def test_images_are_looked_for_where_they_are_said_to_be(tmp_path: Path, images: list[str]) -> None:
    folder = write_tables(tmp_path / "own", {file: ["a"] for file in images}, in_table=False)
    elsewhere = tmp_path / "elsewhere"
    (folder / "images").rename(elsewhere)
    (lost,) = read(folder)
    assert len(lost.findings) == 3
    (found,) = read(folder, images_root=elsewhere)
    assert not found.findings


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path, images: list[str]) -> None:
    found = read_one(write_tables(tmp_path / "own", {file: [f"{file} {t}" for t in "ab"] for file in images}))
    first = found.images[0]
    less = found.without({first, found.captions[2][0]})
    assert (len(less.images), len(less.captions)) == (2, 3)
    assert (less.num_images_left_out, less.num_captions_left_out) == (1, 3)
    assert first not in less.used
    nothing = less.without({found.images[1]})
    assert (nothing.used, nothing.num_images_left_out, nothing.num_captions_left_out) == ((), 3, 6)


def test_references_are_the_captions_of_each_image(tmp_path: Path, images: list[str]) -> None:
    found = read_one(
        write_tables(tmp_path / "own", {images[0]: ["a", "b"], images[1]: ["a"], images[2]: ["c"]})
    )
    references = reference_set(found)
    assert [texts for _, texts in references.references] == [("a", "b"), ("a",), ("c",)]
    assert references.used == found.images
    less = references.without({found.images[0]})
    assert (len(less.references), less.num_images_left_out) == (2, 1)
    assert less.without({found.images[1]}).used == ()


def test_a_null_among_captions_is_a_finding_and_not_dropped(tmp_path: Path, images: list[str]) -> None:
    folder = write_tables(tmp_path / "own", {file: [f"{file} a", f"{file} b"] for file in images})
    path = folder / "data/test-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1]["text"][0] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = read_one(folder)
    assert list(found.findings.values()) == ["caption_text: it is empty and there is no image"]
    assert found.without(found.findings).num_captions_left_out == 1


def test_a_test_split_in_two_places_is_refused(tmp_path: Path, images: list[str]) -> None:
    folder = write_tables(tmp_path / "own", {file: ["a"] for file in images})
    content = (folder / "data/test-00000-of-00001.parquet").read_bytes()
    (folder / "test.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"the split test is in .*own and in .*own/data, and would be read"):
        read(folder)


def test_an_urban1k_caption_that_is_no_file_is_named(tmp_path: Path, images: list[str]) -> None:
    folder = write_urban1k(tmp_path / "urban", {file: ["a town"] for file in images})
    path = next((folder / "caption").glob("*.txt"))
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=f"urban/caption/{path.name}: cannot be read: Is a directory"):
        read(folder)


def test_a_sharegpt4v_nested_too_deeply_is_named(tmp_path: Path, images: list[str]) -> None:
    folder = write_sharegpt4v(tmp_path / "sharegpt", [(file, "a") for file in images])
    next(folder.glob("*.json")).write_text('[{"image": ' + "[" * 100_000)
    with pytest.raises(DataError, match="row 0 is nested too deeply"):
        read(folder)


def test_sugarcrepe_says_of_which_subset_nothing_remains(tmp_path: Path, images: list[str]) -> None:
    folder = write_sugarcrepe(tmp_path / "sugar", [(file, "a", "b") for file in images])
    path = next(folder.rglob("add_att.json"))
    path.write_text(path.read_text().replace('"b"', '"only here"'))
    (found,) = read(folder)
    assert isinstance(found, ChoiceSet)
    less = found.without({index for index, item in enumerate(found.items) if item.text == "only here"})
    assert {choice.subset for choice in less.choices} == SUBSETS.keys() - {"add_att"}
    assert str(
        less.note
    ) == f"{found.note} SugarCrepe: nothing remains of add_att; a mean without all of its " + (
        "subsets is not given."
    )
    assert found.without({choice.image for choice in found.choices}).used == ()
