"""Two commands that write the same folder: the second waits for the first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agff.release_writer import save_release
from data_pipeline.claim import claimed
from data_pipeline.convert import prepare
from launcher import embed, mine
from launcher.embedding.taken_folder import CLAIM_FILE
from tests.agff.test_release import embedder
from tests.drawings import tiny_backbone
from tests.mmeb import row, write_subset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("taken")
    write_subset(root / "mmeb", [row(qry=f"q{i}", pos_text=f"p{i}") for i in range(3)])
    prepare(root / "mmeb", root / "shards")
    save_release(embedder(tiny_backbone(root / "backbone")), root / "release", origin={})
    return root


@pytest.mark.parametrize(
    ("main", "source", "more", "written"),
    [
        (embed.main, "shards", ["--all_vectors", "--num_workers", "0"], "vectors.npy"),
        (embed.main, "shards", [], "Sub.npy"),
        (mine.main, "mmeb", ["--num_workers", "0", "--margin", "none"], "mining.json"),
    ],
)
def test_the_second_command_waits_for_the_first(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    main: Callable[[list[str]], int],
    source: str,
    more: list[str],
    written: str,
) -> None:
    out, codes = tmp_path / "out", list[int]()
    out.mkdir()
    argv = [str(folder / "release"), str(folder / source), str(out), *more]
    second = threading.Thread(target=lambda: codes.append(main(argv)))
    with claimed(out / CLAIM_FILE):
        second.start()
        deadline = time.monotonic() + 120
        while "is being written by process" not in caplog.text:
            assert time.monotonic() < deadline
            assert second.is_alive()
            time.sleep(0.01)
        assert [path.name for path in out.iterdir()] == [CLAIM_FILE], "nothing is written meanwhile"
    second.join()
    assert codes == [0]
    assert (out / written).exists()
    assert not (out / CLAIM_FILE).exists()
