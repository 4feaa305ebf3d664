"""Which sets a folder holds, and sets.json."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agff.errors import DataError
from data_pipeline.layouts.mmeb_sets import MMEB_SETS, SetInfo, find_eval_sets


def write_table(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{"qry_text": "q"}]), path)


def test_built_in_table_is_mmeb_s() -> None:
    assert len(MMEB_SETS) == 36
    assert sum(info.in_distribution for info in MMEB_SETS.values()) == 20
    counts = {
        task: sum(info.meta_task == task for info in MMEB_SETS.values()) for task in ("classification", "vqa")
    }
    assert counts == {"classification": 10, "vqa": 10}
    assert MMEB_SETS["RefCOCO"] == SetInfo(meta_task="grounding", in_distribution=False)


def test_sets_json_describes_your_own_sets(tmp_path: Path) -> None:
    for name in ("Zebra", "Mine", "GQA"):
        write_table(tmp_path / name / "test.parquet")
    sets = {
        "note": "imitates the format",
        "Zebra": {"meta_task": "retrieval", "in_distribution": True, "about": "ignored"},
        "Mine": {"meta_task": "vqa", "in_distribution": False, "note": "its own"},
    }
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    assert find_eval_sets(tmp_path) == {
        "Zebra": SetInfo(meta_task="retrieval", in_distribution=True, note="imitates the format"),
        "Mine": SetInfo(meta_task="vqa", in_distribution=False, note="its own"),
        "GQA": MMEB_SETS["GQA"],
    }
    assert list(find_eval_sets(tmp_path)) == ["Zebra", "Mine", "GQA"]


def test_unknown_sets_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        find_eval_sets(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"found no <SET>/\*.parquet"):
        find_eval_sets(tmp_path)
    write_table(tmp_path / "Mine/test.parquet")
    with pytest.raises(DataError, match=r"Mine: not one of MMEB's 36 sets; describe it in"):
        find_eval_sets(tmp_path)
    (tmp_path / "sets.json").write_text('{"Gone": {"meta_task": "vqa", "in_distribution": true}}')
    with pytest.raises(DataError, match=r"sets.json lists Gone, but there is no Gone/"):
        find_eval_sets(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[1]", "a list"),
        ("{", "Expecting property name"),
        ('{"Mine": 3}', "3 where a set is described"),
        ('{"Mine": {"meta_task": "vqa"}}', "a set without 'in_distribution'"),
        ('{"Mine": {"meta_task": "vqa", "in_distribution": "false"}}', "in_distribution = 'false'"),
        ('{"Mine": {"meta_task": "vqa", "in_distribution": 0}}', "in_distribution = 0"),
        ('{"Mine": {"meta_task": 3, "in_distribution": true}}', "meta_task = 3"),
        ('{"Mine": {"meta_task": "vqa", "in_distribution": true, "note": 1}}', "note = 1"),
        ('{"note": ["a"]}', r"note = \['a'\]"),
        (
            '{"Mine": {"meta_task": "vqa", "in_distribution": true, "nota": "a"}}',
            r"unknown keys \['nota'\] of Mine",
        ),
        (
            '{"M": {"meta_task": "a", "in_distribution": true}, "M": {"meta_task": "b"}}',
            "the key 'M' twice",
        ),
        ("\udcff", "can't decode byte"),
    ],
    ids=str,
)
def test_values_of_sets_json_are_checked_and_never_converted(
    tmp_path: Path, content: str, found: str
) -> None:
    write_table(tmp_path / "Mine/test.parquet")
    (tmp_path / "sets.json").write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=rf"sets.json: (?:expected .* found|not JSON in UTF-8:) .*{found}"):
        find_eval_sets(tmp_path)


def test_known_set_whose_table_is_missing_or_deeper_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "GQA/test.parquet")
    (tmp_path / "NIGHTS").mkdir()
    write_table(tmp_path / "CIRR/data/test.parquet")
    (tmp_path / "VizWiz").mkdir()
    (tmp_path / "VizWiz/1.jpg").touch()  # a set put aside, its images left
    with pytest.raises(DataError) as raised:
        find_eval_sets(tmp_path)
    assert [line.split(": ")[0].strip() for line in str(raised.value).splitlines()] == [
        str(tmp_path / name) for name in ("CIRR", "NIGHTS")
    ]
    assert "holds no *.parquet of its own; finish the download" in str(raised.value)
