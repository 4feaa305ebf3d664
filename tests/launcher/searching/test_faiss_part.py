"""A FAISS file of each kind: it finds what is near, is mapped and not read, and a wrong one is refused."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agff.errors import ConfigError, DataError
from launcher.searching.faiss_part import (
    FLAT_MOST_ROWS,
    HNSW_MOST_BYTES,
    KINDS,
    STORAGES,
    FaissPart,
    Kind,
    Storage,
    faiss,
    kind_for,
    num_training_rows,
    write_part,
)
from tests.launcher.searching.vectors import random_vectors


def vectors(num_rows: int, dim: int) -> NDArray[np.float32]:
    return random_vectors(num_rows, 1, dim)[:, 0].numpy()


def written(path: Path, rows_ND: NDArray[np.float32], kind: Kind, storage: Storage) -> Path:
    count = num_training_rows(kind, storage, len(rows_ND))
    blocks = (rows_ND[start : start + 100] for start in range(0, len(rows_ND), 100))
    write_part(path, blocks, kind=kind, storage=storage, num_rows=len(rows_ND), training_ND=rows_ND[:count])
    return path


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 40, 400])
def test_each_kind_finds_a_vector_by_itself(
    tmp_path: Path, kind: Kind, storage: Storage, num_rows: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rows_ND = vectors(num_rows, 16)
    part = FaissPart(written(tmp_path / "part", rows_ND, kind, storage), kind, num_rows=num_rows, dim=16)
    scores, rows = part.nearest(rows_ND, 5)
    assert rows[:, 0].tolist() == list(range(num_rows))
    assert rows.shape == (num_rows, min(5, num_rows))
    np.testing.assert_allclose(scores[:, 0], 1, atol=0.02)  # a step of 256 levels in each of 16 dimensions
    assert capfd.readouterr() == ("", "")  # FAISS prints its warnings past Python


@pytest.mark.parametrize("kind", KINDS)
def test_int8_takes_a_quarter(tmp_path: Path, kind: Kind) -> None:
    rows_ND = vectors(400, 512)
    sizes = [written(tmp_path / name, rows_ND, kind, name).stat().st_size for name in STORAGES]
    beside = sizes[0] - rows_ND.nbytes  # ids, links, centroids
    assert beside < rows_ND.nbytes / 4
    assert abs(sizes[1] - beside - rows_ND.nbytes / 4) < 3 * 4 * 512  # the levels of each dimension


@pytest.mark.parametrize(("storage", "num_rows"), [("float32", 2_000), ("int8", 8_000)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_mapped_and_not_read(tmp_path: Path, kind: Kind, storage: Storage, num_rows: int) -> None:
    rows_ND = vectors(num_rows, 2_048)
    path = written(tmp_path / "part", rows_ND, kind, storage)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not be seen
    before = own_bytes()
    part = FaissPart(path, kind, num_rows=num_rows, dim=2_048)
    part.nearest(rows_ND[:3], 10)
    assert own_bytes() - before < path.stat().st_size / 4  # 16 MB are vectors


def own_bytes() -> int:
    """Of memory that is this process's own; pages of mapped files are not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_as_are_asked_for_are_found(tmp_path: Path, kind: Kind, storage: Storage) -> None:
    """Also where the lists that are read hold fewer, and where equal vectors cut the graph into pieces."""
    rows_ND = np.concatenate([vectors(1_000, 16), vectors(2, 16).repeat(2_000, axis=0)])
    part = FaissPart(written(tmp_path / "part", rows_ND, kind, storage), kind, num_rows=5_000, dim=16)
    for count in (500, 3_000, 5_000):
        scores, rows = part.nearest(rows_ND[-2:], count)
        assert [len(set(found.tolist())) for found in rows] == [count, count]
        assert (np.diff(scores, axis=1) <= 0).all()
        np.testing.assert_allclose(
            scores, (rows_ND[-2:, None] * rows_ND[rows]).sum(axis=2), atol=0.05
        )  # int8


def test_one_list_in_sixteen_is_read(tmp_path: Path) -> None:
    rows_ND = vectors(10_000, 16)
    part = FaissPart(written(tmp_path / "part", rows_ND, "ivf", "float32"), "ivf", num_rows=10_000, dim=16)
    counted = faiss().cvar.indexIVF_stats
    counted.reset()
    part.nearest(rows_ND[:3], 5)
    assert counted.nlist == 3 * (10_000 // 39 // 16)  # each list has 39 vectors to be trained on


@pytest.mark.parametrize("rows", [[0, 1, 1_000], [0, 1, -7]])
def test_rows_that_are_not_there_are_damage(tmp_path: Path, rows: list[int]) -> None:
    rows_ND = vectors(3, 16)
    library = faiss()
    index = library.IndexIVFFlat(library.IndexFlatIP(16), 16, 1, library.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(rows_ND)
    index.add_with_ids(rows_ND, np.array(rows))
    library.write_index(index, str(tmp_path / "part"))
    with pytest.raises(DataError, match="part: is damaged, as its rows show; build the index again"):
        FaissPart(tmp_path / "part", "ivf", num_rows=3, dim=16).nearest(rows_ND, 3)


def test_the_kind_follows_from_the_size() -> None:
    most_rows = HNSW_MOST_BYTES // (4 * 1_024)
    assert kind_for(FLAT_MOST_ROWS, 10_000, "float32") == "flat"
    assert kind_for(FLAT_MOST_ROWS + 1, 1_024, "float32") == "hnsw"
    assert kind_for(most_rows, 1_024, "float32") == "hnsw"
    assert kind_for(most_rows + 1, 1_024, "float32") == "ivf"
    assert kind_for(most_rows + 1, 1_024, "int8") == "hnsw"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["cut", "empty", "another file"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, kind: Kind, damage: str) -> None:
    path = written(tmp_path / "part", vectors(400, 16), kind, "float32")
    content = {"cut": path.read_bytes()[:-1_000], "empty": b"", "another file": b"junk" * 400}[damage]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part: cannot be read: .+; build the index again"):
        FaissPart(path, kind, num_rows=400, dim=16)


@pytest.mark.parametrize(("kind", "num_rows", "dim"), [("hnsw", 50, 16), ("flat", 51, 16), ("flat", 50, 17)])
def test_another_kind_or_size_is_refused(tmp_path: Path, kind: Kind, num_rows: int, dim: int) -> None:
    path = written(tmp_path / "part", vectors(50, 16), "flat", "float32")
    expected = rf"IndexFlatIP of 50 vectors of 16 dimensions, must be {kind} of {num_rows} of {dim}"
    with pytest.raises(DataError, match=expected):
        FaissPart(path, kind, num_rows=num_rows, dim=dim)


def test_without_faiss_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        faiss()


IN_TURN = """
import faiss, torch  # in this order each brings an OpenMP of its own
torch.set_num_threads(1)
from launcher.searching import faiss_part
assert faiss_part.faiss().omp_get_max_threads() == 1
torch.set_num_threads(2)
assert faiss_part.faiss().omp_get_max_threads() == 2
rows_ND = torch.nn.functional.normalize(torch.randn(400, 64), dim=1)
index = faiss.IndexFlatIP(64)
index.add(rows_ND.numpy())
for _ in range(3):
    expected_N = (rows_ND @ rows_ND.T).amax(dim=1)
    scores_N1, _ = index.search(rows_ND.numpy(), 1)
    torch.testing.assert_close(torch.from_numpy(scores_N1[:, 0]), expected_N)
"""


def test_faiss_and_torch_work_in_turn_with_as_many_threads() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IN_TURN], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
