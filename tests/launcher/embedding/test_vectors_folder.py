"""Vectors of a corpus: what is read is what was written, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agff.errors import DataError
from agff.files import file_fingerprint
from launcher.embedding.vectors_folder import (
    DESCRIPTION_FILE,
    Description,
    VectorItem,
    VectorsFolder,
    write_description,
)

ITEMS = (
    VectorItem(id="a", text="ein Stück\nHolz", image=None),
    VectorItem(id="b", text=None, image="one/b.png"),
    VectorItem(id="c", text="both", image="../secret.png"),
)


def write_vectors(folder: Path, *, source: Path | None = None) -> Path:
    """Three items of two vectors of four dimensions."""
    folder.mkdir()
    np.save(folder / "vectors.npy", np.arange(24, dtype=np.float16).reshape(3, 2, 4))
    lines = [json.dumps(vars(item), ensure_ascii=False) + "\n" for item in ITEMS]
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "rejected.jsonl").write_text("")
    names = ("vectors.npy", "items.jsonl", "rejected.jsonl")
    description = Description(
        model="release",
        weights_sha256="0",
        settings={},
        fusion={"beta": 0.05},
        input=str(source or folder),
        input_fingerprint="0",
        num_items=3,
        num_vectors=2,
        dim=4,
        dtype="float16",
        num_rejected=0,
        num_cut=0,
        files={name: file_fingerprint(folder / name) for name in names},
    )
    write_description(folder, description)
    return folder


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    vectors = VectorsFolder(write_vectors(tmp_path / "v"), check_hashes=True)
    assert len(vectors) == 3
    assert vectors.vectors[1].tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert isinstance(vectors.vectors, np.memmap)
    assert tuple(vectors.item(row) for row in range(3)) == ITEMS
    assert vectors.fusion.beta == 0.05


def test_an_image_is_found_below_the_input_only(tmp_path: Path) -> None:
    (tmp_path / "in/one").mkdir(parents=True)
    for path in ("in/one/b.png", "secret.png"):
        (tmp_path / path).write_bytes(b"")
    vectors = VectorsFolder(write_vectors(tmp_path / "v", source=tmp_path / "in"))
    assert [vectors.image_file(item) for item in ITEMS] == [None, tmp_path / "in/one/b.png", None]


def cut(folder: Path) -> None:
    (folder / "vectors.npy").write_bytes((folder / "vectors.npy").read_bytes()[:-1])


def another_byte(folder: Path) -> None:
    content = (folder / "vectors.npy").read_bytes()
    (folder / "vectors.npy").write_bytes(content[:-1] + b"?")


def changed(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / DESCRIPTION_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


FILES = ("vectors.npy", "items.jsonl", "rejected.jsonl")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "vectors.npy: found 175 bytes, sha256 "),
        (another_byte, "vectors.npy: found 176 bytes, sha256 "),
        (lambda folder: (folder / "items.jsonl").unlink(), "items.jsonl: cannot read it: No such file"),
        (lambda folder: (folder / DESCRIPTION_FILE).unlink(), "no vectors here, or they are not complete"),
        (lambda folder: (folder / DESCRIPTION_FILE).write_text("{"), "vectors.json: cannot be read: "),
        (changed(format=2), "vectors.json: format 2 is not 1, which this version reads; make them again"),
        (changed(more=1), "vectors.json: cannot be read: its keys must be dim, dtype, files"),
        (changed(sources={}), "a teacher's vectors of shards, of no use here"),
        (changed(num_items=4), "holds (3, 2, 4) float16, it must be (4, 2, 4) float16"),
        (changed(dtype="float32"), "holds (3, 2, 4) float16, it must be (3, 2, 4) float32"),
        (changed(dtype="int8"), 'dtype int8, files {"vectors.npy": '),
        (changed(num_items=0), "num_items, num_vectors, dim (0, 2, 4)"),
        (changed(files={}), "files {}: not those of vectors"),
        (changed(files={"../x": "1 bytes"}), 'files {"../x": "1 bytes"}: not those of vectors'),
        (changed(files=["vectors.npy"]), 'files ["vectors.npy"]: not those of vectors'),
        (changed(files=dict.fromkeys(FILES, 1)), ": 1}: not those of vectors"),
        (changed(files=dict.fromkeys([*FILES, "/etc/passwd"], "1 bytes")), "not those of vectors"),
    ],
)
def test_other_files_than_those_that_were_written_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = write_vectors(tmp_path / "v")
    damage(folder)
    with pytest.raises(DataError) as caught:
        VectorsFolder(folder, check_hashes=True)
    assert message in str(caught.value)


def test_a_line_that_is_no_item_is_named(tmp_path: Path) -> None:
    folder = write_vectors(tmp_path / "v")
    content = (folder / "items.jsonl").read_bytes()
    (folder / "items.jsonl").write_bytes(content.replace(b'"id"', b'"di"'))
    with pytest.raises(DataError, match=r"items.jsonl: line 2: not an item"):
        VectorsFolder(folder).item(1)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [("id", b'"b"', b"123"), ("text", b"null", b"1234"), ("image", b'"one/b.png"', b"12345678901")],
)
def test_a_line_that_holds_a_number_is_named(tmp_path: Path, key: str, old: bytes, new: bytes) -> None:
    folder = write_vectors(tmp_path / "v")
    first, line, last = (folder / "items.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "items.jsonl").write_bytes(first + line.replace(old, new, 1) + last)
    with pytest.raises(DataError, match=rf"items.jsonl: line 2: not an item: .*{key}"):
        VectorsFolder(folder).item(1)


def test_an_image_whose_name_no_file_can_have_is_not_there(tmp_path: Path) -> None:
    vectors = VectorsFolder(write_vectors(tmp_path / "v", source=tmp_path))
    for name in ("x" * 300, "a\0b", "a \ud83d"):
        assert vectors.image_file(VectorItem(id="a", text=None, image=name)) is None


def test_a_folder_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        VectorsFolder(tmp_path / "v")


def test_a_cut_file_is_found_without_reading_it(tmp_path: Path) -> None:
    folder = write_vectors(tmp_path / "v")
    cut(folder)
    with pytest.raises(DataError, match=r"vectors.npy: found 175 bytes, written were 176 bytes"):
        VectorsFolder(folder)
