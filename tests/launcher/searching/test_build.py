"""Building an index: whole or not at all, in parts, bound to its vectors."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from agff.errors import AgffError, ConfigError, DataError
from agff.files import locked
from launcher.searching import build, faiss_part, vector_blocks
from launcher.searching.build import IndexChoice, build_index
from launcher.searching.faiss_part import KINDS, STORAGES, Kind, Storage
from launcher.searching.index_folder import FINE, GLOBAL, INDEX_FILE
from launcher.searching.searcher import Searcher
from tests.launcher.searching.vectors import built, random_vectors, write_vectors


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    return write_vectors(tmp_path / "vectors", random_vectors(60))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_find_what_one_part_finds(
    vectors: Path, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_blocks, "BLOCK_BYTES", 5 * 4 * 16)  # of 5 vectors
    one = built(vectors, tmp_path / "one", IndexChoice(kind="flat", with_fine=True))
    choice = IndexChoice(kind=kind, with_fine=True, part_bytes=14 * 4 * 16)
    cut = built(vectors, tmp_path / "cut", choice)
    found = [Searcher(index) for index in (one, cut)]
    groups = found[1].description.groups
    assert [part.num_items for part in groups[GLOBAL].parts] == [14, 14, 14, 14, 4]
    assert [part.num_items for part in groups[FINE].parts] == [7] * 8 + [4]
    for query_MD in random_vectors(5, seed=1):
        for with_fine in (False, True):
            rows = [searcher.candidates(query_MD, 7, with_fine=with_fine).tolist() for searcher in found]
            assert rows[0] == rows[1]


def test_progress_counts_the_vectors(vectors: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    build_index(vectors, tmp_path / "index", IndexChoice(with_fine=True), progress=counts.append)
    assert sum(counts) == 60 * 3


def test_the_index_keeps_its_vectors_by_a_second_name(vectors: Path, tmp_path: Path) -> None:
    """It costs no space, and the first name may go."""
    index = built(vectors, tmp_path / "index", IndexChoice())
    assert (index / "vectors/vectors.npy").samefile(vectors / "vectors.npy")
    for path in vectors.iterdir():
        path.unlink()
    moved = index.rename(tmp_path / "moved")
    assert Searcher(moved, check_hashes=True).vectors.item(3).id == "item 3"


def test_it_copies_them_where_there_are_no_second_names(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    index = built(vectors, tmp_path / "index", IndexChoice())
    assert not (index / "vectors/vectors.npy").samefile(vectors / "vectors.npy")
    assert len(Searcher(index, check_hashes=True).vectors) == 60


def test_a_folder_that_exists_is_refused(vectors: Path, tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(ConfigError, match="index exists already; choose another folder or remove it"):
        built(vectors, tmp_path / "index", IndexChoice())
    assert names_in(tmp_path / "index") == set()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="link exists already"):
        built(vectors, tmp_path / "link", IndexChoice())
    assert names_in(tmp_path) == {"vectors", "index", "link"}


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_without_a_name_is_refused(vectors: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vectors)
    before = names_in(vectors)
    with pytest.raises(ConfigError, match="exists already; choose another folder"):
        built(vectors, Path(out), IndexChoice())
    assert names_in(vectors) == before


def test_a_name_that_faiss_cannot_open_is_refused(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FAISS opens only names in UTF-8; choose another folder"):
        built(vectors, tmp_path / os.fsdecode(b"index \xff"), IndexChoice())
    assert names_in(tmp_path) == {"vectors"}


def test_two_processes_do_not_write_the_same_index(vectors: Path, tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".index.lock"),
        pytest.raises(ConfigError, match="index: another process is writing it; wait for it"),
    ):
        built(vectors, tmp_path / "index", IndexChoice())
    assert names_in(tmp_path) == {"vectors", ".index.lock"}  # the other's
    built(vectors, tmp_path / "index", IndexChoice())
    assert names_in(tmp_path) == {"vectors", "index"}


def test_what_a_killed_build_left_is_removed(vectors: Path, tmp_path: Path) -> None:
    left = [tmp_path / f"index.{host}-1.partial" for host in (socket.gethostname(), "elsewhere")]
    for folder in left:
        folder.mkdir()
    built(vectors, tmp_path / "index", IndexChoice())
    assert [folder.exists() for folder in left] == [False, True]  # the other may be at work


def test_an_index_that_appears_meanwhile_is_refused(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def after_the_other(path: Path, *, wait: bool) -> Iterator[bool]:
        (tmp_path / "index").mkdir()
        with locked(path, wait=wait) as is_ours:
            yield is_ours

    monkeypatch.setattr(build, "locked", after_the_other)
    with pytest.raises(ConfigError, match="index exists already"):
        built(vectors, tmp_path / "index", IndexChoice())
    assert names_in(tmp_path) == {"vectors", "index"}
    assert names_in(tmp_path / "index") == set()


def test_each_part_is_trained_on_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 cuts what is beyond its training sample; here the corpus is in an order, as corpora are."""
    monkeypatch.setattr(faiss_part, "_QUANTIZER_ROWS", 50)
    quarter = torch.arange(200) // 50
    corpus_NMD = torch.nn.functional.one_hot(quarter, 16)[:, None] + 0.5 * random_vectors(200, 1)
    corpus_NMD = torch.nn.functional.normalize(corpus_NMD, dim=-1)
    folder = write_vectors(tmp_path / "vectors", corpus_NMD)
    index = built(folder, tmp_path / "index", IndexChoice(storage="int8", part_bytes=100 * 16))
    found = [Searcher(index).candidates(query_MD, 1, with_fine=False).tolist() for query_MD in corpus_NMD]
    assert found == [[row] for row in range(200)]


def test_what_another_build_writes_is_left_whatever_the_name(vectors: Path, tmp_path: Path) -> None:
    """A name is no pattern: `i*` is not `index`."""
    other = tmp_path / f"index.{socket.gethostname()}-1.partial"
    other.mkdir()
    built(vectors, tmp_path / "i*", IndexChoice())
    assert other.exists()


def not_finite(folder: Path) -> Path:
    vectors_NMD = random_vectors(60)
    vectors_NMD[41, 2, 3] = torch.nan
    return write_vectors(folder, vectors_NMD)


def cut_short(folder: Path) -> Path:
    path = write_vectors(folder, random_vectors(60)) / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-4])
    return folder


def changed_byte(folder: Path) -> Path:
    array = np.load(write_vectors(folder, random_vectors(60)) / "vectors.npy", mmap_mode="r+")
    array[7, 0, 0] += 1
    array.flush()
    return folder


def without_fine(folder: Path) -> Path:
    return write_vectors(folder, random_vectors(60, 1))


def absent(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (not_finite, r"the vectors of item 'item 41' \(row 41\) hold NaN or infinity"),
        (cut_short, r"vectors.npy: found \d+ bytes.*, written were"),
        (changed_byte, r"vectors.npy: found .*sha256 .*, written were"),
        (without_fine, r"its items have no fine vectors; leave --fine out"),
        (absent, r"corpus: no such folder"),
    ],
)
def test_of_vectors_that_cannot_be_used_nothing_is_written(
    tmp_path: Path, write: Callable[[Path], Path], message: str
) -> None:
    folder = write(tmp_path / "corpus")
    before = names_in(tmp_path)
    with pytest.raises(AgffError, match=message):
        built(folder, tmp_path / "index", IndexChoice(with_fine=True))
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_names_the_item_that_is_not_finite(tmp_path: Path, kind: Kind, storage: Storage) -> None:
    vectors_NMD = random_vectors(60)
    vectors_NMD[0, 0, 3] = torch.inf  # of the training sample too
    folder = write_vectors(tmp_path / "vectors", vectors_NMD)
    with pytest.raises(DataError, match=r"item 'item 0' \(row 0\) hold NaN or infinity"):
        built(folder, tmp_path / "index", IndexChoice(kind=kind, storage=storage))
    assert names_in(tmp_path) == {"vectors"}


def test_a_place_that_cannot_be_written_is_named(vectors: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/index: cannot be written: .*; choose another folder"):
        built(vectors, tmp_path / "file/index", IndexChoice())


def test_a_full_disk_leaves_nothing(vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_part(path: Path, *arguments: object, **choices: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_part", write_part)
    with pytest.raises(ConfigError, match=r"index: cannot be written: No space left on device; .* make room"):
        built(vectors, tmp_path / "index", IndexChoice())
    assert names_in(tmp_path) == {"vectors"}


def test_the_index_says_whose_it_is(vectors: Path, tmp_path: Path) -> None:
    values = json.loads((built(vectors, tmp_path / "index", IndexChoice()) / INDEX_FILE).read_text())
    assert values["weights_sha256"] == "a" * 64
    assert values["files"].keys() == {"global-00000.faiss", "vectors/vectors.json"}


def test_vectors_in_half_precision_are_taken(tmp_path: Path) -> None:
    folder = write_vectors(tmp_path / "vectors", random_vectors(60).half())
    index = built(folder, tmp_path / "index", IndexChoice())
    assert Searcher(index).candidates(random_vectors(60)[5], 1, with_fine=False).tolist() == [5]
