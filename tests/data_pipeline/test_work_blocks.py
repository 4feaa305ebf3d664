"""Blocks of a work: written whole, found again, never of another work."""

from __future__ import annotations

from pathlib import Path

import pytest

from agff.errors import ConfigError, DataError
from data_pipeline.work_blocks import WorkBlocks


def begun(folder: Path, **settings: int) -> WorkBlocks:
    work = WorkBlocks(folder, settings_file="work.json")
    work.begin({"a": 1, **settings}, what="results")
    return work


def test_a_block_is_what_was_written_and_others_are_missing(tmp_path: Path) -> None:
    work = begun(tmp_path)
    assert work.is_begun
    work.write("one", {"lines": ["a\nb"]}, b"bytes\nof two lines")
    again = begun(tmp_path)
    assert again.missing(["one", "two"]) == ["two"]
    assert (again.note("one"), again.content("one")) == ({"lines": ["a\nb"]}, b"bytes\nof two lines")
    with pytest.raises(DataError, match="block two is not written; give the same command again"):
        again.note("two")


def test_a_finished_work_misses_nothing_and_leaves_no_block(tmp_path: Path) -> None:
    work = begun(tmp_path)
    work.write("one", {}, b"")
    (tmp_path / "killed.partial").write_text("")
    work.finish({"a": 1, "result": 5})
    work.clean_up()
    assert [path.name for path in tmp_path.iterdir()] == ["work.json"]
    assert begun(tmp_path).missing(["one", "two"]) == []


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(tmp_path: Path, finished: bool) -> None:
    work = begun(tmp_path)
    if finished:
        work.finish({"a": 1})
    with pytest.raises(ConfigError, match="holds results with other a; remove it"):
        begun(tmp_path, a=2)
    path = tmp_path / ("work.json" if finished else ".blocks/work.json")
    path.write_text("[")
    with pytest.raises(ConfigError, match=r"work.json is damaged; remove"):
        begun(tmp_path)
