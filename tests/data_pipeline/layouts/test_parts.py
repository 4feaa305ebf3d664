"""Files that come in parts: all of them, each once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agff.errors import DataError
from data_pipeline.layouts.parts import check_parts


def paths(*names: str) -> list[Path]:
    return [Path("S") / f"{name}.parquet" for name in names]


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["test"],
        ["test", "other"],
        ["test-00000-of-00001"],
        ["test-00001-of-00002", "test-00000-of-00002"],
        ["test-00000-of-00001", "val-00000-of-00002", "val-00001-of-00002"],
        ["one-of-many", "part-of-2"],
    ],
    ids=" ".join,
)
def test_complete_files_are_accepted(names: list[str]) -> None:
    check_parts(paths(*names))


@pytest.mark.parametrize(
    ("names", "findings"),
    [
        (["t-00000-of-00002"], ["S/t: 1 of 2 parts missing: -00001-of-00002; finish the download"]),
        (["t-00001-of-00003"], ["S/t: 2 of 3 parts missing: -00000-of-00003, -00002-of-00003; finish"]),
        (["t-00000-of-00100"], ["99 of 100 parts missing", "-00010-of-00100 and 89 more; finish"]),
        (
            ["t-00000-of-00001", "t-00000-of-00002"],
            ["S/t: has parts -of-00001 and -of-00002, of two versions"],
        ),
        (["t-00000-of-00001"] * 2, ["S/t: parts there twice: -00000-of-00001; remove one of each"]),
        (["t-0-of-2", "t-00000-of-2", "t-1-of-2"], ["parts there twice: -00000-of-00002"]),
        (["t-00000-of-00001", "t-00001-of-00001"], ["beyond the last, -00000-of-00001: -00001-of-00001"]),
        (["t-00000-of-00000"], ["parts beyond the last"]),
        (["t-00000-of-00001", "t"], ["S/t.parquet: lies beside its own parts and would be read twice"]),
        (
            ["t-00000-of-00002", "u-00001-of-00002"],
            ["S/t: 1 of 2 parts missing", "S/u: 1 of 2 parts missing"],
        ),
    ],
    ids=str,
)
def test_every_gap_is_named(names: list[str], findings: list[str]) -> None:
    with pytest.raises(DataError, match="(?s)" + ".*".join(map(re.escape, findings))):
        check_parts(paths(*names))


def test_each_finding_has_its_line() -> None:
    with pytest.raises(DataError) as raised:
        check_parts(paths("t-00000-of-00002", "u-00001-of-00002"))
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["S/t", "S/u"]
