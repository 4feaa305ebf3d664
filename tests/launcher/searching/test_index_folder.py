"""An index that is not as it was written is refused, by one message, before FAISS sees a file of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agff.errors import DataError
from agff.files import file_fingerprint
from launcher.searching import index_folder
from launcher.searching.build import IndexChoice
from launcher.searching.index_folder import INDEX_FILE, open_folder
from tests.launcher.searching.vectors import built, random_vectors, write_vectors

Fault = Callable[[Path], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index")
    vectors = write_vectors(root / "vectors", random_vectors(30))
    return built(vectors, root / "index", IndexChoice(kind="hnsw", with_fine=True))


def text(content: str) -> Fault:
    return lambda index: (index / INDEX_FILE).write_text(content)


def edited(edit: Callable[[dict[str, Any]], object]) -> Fault:
    def change(index: Path) -> None:
        values = json.loads((index / INDEX_FILE).read_text())
        edit(values)
        (index / INDEX_FILE).write_text(json.dumps(values))

    return change


def first_part(**values: object) -> Fault:
    return edited(lambda index: index["groups"]["global"]["parts"][0].update(values))


def file_more(name: str) -> Fault:
    return edited(lambda index: index["files"].update({name: "1 bytes, sha256 0"}))


def one_byte(name: str) -> Fault:
    def change(index: Path) -> None:
        content = bytearray((index / name).read_bytes())
        content[-100] ^= 1
        (index / name).write_bytes(content)

    return change


def cut(name: str) -> Fault:
    return lambda index: (index / name).write_bytes((index / name).read_bytes()[:-10])


def gone(name: str) -> Fault:
    return lambda index: (index / name).unlink()


def of_other_vectors(index: Path) -> None:
    shutil.rmtree(index / "vectors")
    write_vectors(index / "vectors", random_vectors(30, seed=1))


def rebound(num_items: int = 30, num_vectors: int = 3, weights_sha256: str = "a" * 64) -> Fault:
    """Other vectors, and index.json was brought up to date."""

    def change(index: Path) -> None:
        shutil.rmtree(index / "vectors")
        vectors_NMD = random_vectors(num_items, num_vectors)
        folder = write_vectors(index / "vectors", vectors_NMD, weights_sha256=weights_sha256)
        name = "vectors/vectors.json"
        edited(lambda v: v["files"].update({name: file_fingerprint(folder / "vectors.json")}))(index)

    return change


FAULTS: dict[str, tuple[Fault, str]] = {
    "no index": (gone(INDEX_FILE), r"no index here \(index.json is missing\)"),
    "no folder": (shutil.rmtree, r"no such folder; make one of vectors: python launcher/search.py"),
    "no JSON": (text("{"), r"index.json: cannot be read: "),
    "a list": (text("[]"), r"index.json: cannot be read: "),
    "nested JSON": (text("[" * 100_000), r"index.json: cannot be read"),
    "newer format": (
        edited(lambda v: v.update(format=2)),
        r"format 2 is newer than 1, .*; update agff-embed",
    ),
    "no format": (edited(lambda v: v.pop("format")), r"index.json: cannot be read: 'format'"),
    "unknown key": (edited(lambda v: v.update(more=1)), r"index.json: cannot be read: .*more"),
    "unknown kind": (edited(lambda v: v["groups"]["fine"].update(kind="lsh")), r"fine: kind lsh"),
    "unknown storage": (edited(lambda v: v.update(storage="int4")), r"storage int4"),
    "the global vector among the fine": (
        edited(lambda v: v["groups"]["fine"].update(first_vector=0)),
        r"fine: kind hnsw, vectors from 0",
    ),
    "unknown group": (edited(lambda v: v["groups"].update(x=v["groups"]["fine"])), r"groups global, fine, x"),
    "no global vectors": (edited(lambda v: v["groups"].pop("global")), r"it has no global vectors"),
    "a part less": (edited(lambda v: v["groups"]["global"].update(parts=[])), r"global: 0 items of 30"),
    "a hole": (first_part(first_item=1), r"global: part 0 is global-00000.faiss, from item 1"),
    "a part outside": (first_part(file="/etc/passwd"), r"global: part 0 is /etc/passwd"),
    "a part that is another": (first_part(file="fine-00000.faiss"), r"global: part 0 is fine-00000.faiss"),
    "a number that is a text": (first_part(num_items="30"), r"part 0: num_items must be .* found '30'"),
    "a number that is none": (
        edited(lambda v: v["groups"]["fine"].update(num_vectors=2.0)),
        r"fine: num_vectors must be a whole number >= 1, found 2.0",
    ),
    "items that are no number": (
        edited(lambda v: v.update(num_items=30.0)),
        r"num_items must be a whole num",
    ),
    "a list of files": (edited(lambda v: v.update(files=list(v["files"]))), r"index.json: cannot be read"),
    "a fingerprint that is none": (
        edited(lambda v: v["files"].update({"global-00000.faiss": 5})),
        r"fingerprints .* must be texts",
    ),
    "a file less": (edited(lambda v: v["files"].pop("vectors/vectors.json")), r"files 'global-00000.faiss'"),
    "a file outside": (file_more("../x"), r"files .*'../x'"),
    "a file that cannot be": (file_more("a\0b"), r"files .*'a\\x00b'"),
    "a name too long": (file_more("x" * 300), r"files .*'xxx"),
    "a part is gone": (gone("fine-00000.faiss"), r"fine-00000.faiss: cannot read it"),
    "a cut part": (cut("global-00000.faiss"), r"global-00000.faiss: found \d+ bytes.*, written were"),
    "a changed part": (one_byte("global-00000.faiss"), r"global-00000.faiss: found .*, written were"),
    "cut vectors": (cut("vectors/vectors.npy"), r"vectors.npy: found \d+ bytes"),
    "changed vectors": (one_byte("vectors/vectors.npy"), r"vectors.npy: found .*, written were"),
    "a changed item": (one_byte("vectors/items.jsonl"), r"items.jsonl: found .*, written were"),
    "other vectors": (of_other_vectors, r"vectors/vectors.json: found .*, written were"),
    "another release's": (rebound(weights_sha256="b" * 64), r"its vectors are not those that the index was"),
    "of fewer items": (rebound(num_items=29), r"its vectors are not those that the index was built from"),
    "of more vectors": (rebound(num_vectors=4), r"its vectors are not those that the index was built from"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_message(intact: Path, tmp_path: Path, fault: str) -> None:
    index = shutil.copytree(intact, tmp_path / "index")
    damage, message = FAULTS[fault]
    damage(index)
    with pytest.raises(DataError, match=message) as error:
        open_folder(index, check_hashes=False)
    assert str(index) in str(error.value)


def test_all_damaged_files_are_listed(intact: Path, tmp_path: Path) -> None:
    index = shutil.copytree(intact, tmp_path / "index")
    for name in ("global-00000.faiss", "fine-00000.faiss"):
        one_byte(name)(index)
    with pytest.raises(DataError, match=r"(?s)fine-00000.faiss: found.*global-00000.faiss: found"):
        open_folder(index, check_hashes=False)


def test_of_a_large_file_the_size_alone_is_compared_but_of_a_graph(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_folder, "MAX_HASHED_BYTES", 1_000)
    index = shutil.copytree(intact, tmp_path / "index")
    one_byte("vectors/vectors.npy")(index)
    open_folder(index, check_hashes=False)
    with pytest.raises(DataError, match=r"vectors.npy: found"):
        open_folder(index, check_hashes=True)
    one_byte("global-00000.faiss")(index)
    with pytest.raises(DataError, match=r"global-00000.faiss: found"):
        open_folder(index, check_hashes=False)
