from __future__ import annotations

import json
from pathlib import Path

import pytest

from agff.errors import DataError
from data_pipeline.layouts import json_rows as module
from data_pipeline.layouts.json_rows import json_rows, read_json

ROWS = [
    {"id": n, "text": f'größe \U0001f600 {{}}[],"\\ {"x" * (n % 7)}', "more": [n, {"a": None}]}
    for n in range(700)
]
WRITTEN = {
    "a list": json.dumps(ROWS),
    "a list of UTF-8, indented": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "a byte order mark": "\ufeff" + json.dumps(ROWS) + "\n",
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("size_bytes", [61, 2**22])
def test_any_part_is_what_a_parser_of_the_whole_file_finds_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size_bytes: int
) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", size_bytes)
    path = tmp_path / "rows.json"
    path.write_text(WRITTEN[kind], encoding="utf-8")
    rows = json_rows(path)
    assert rows.num_rows == 700
    for start, stop in ((0, 700), (0, 1), (255, 258), (256, 512), (511, 513), (690, 900), (5, 5), (700, 710)):
        assert list(rows.between(start, stop)) == ROWS[start:stop]


def test_a_part_is_found_without_reading_what_is_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(WRITTEN["a list"])
    rows, parsed = json_rows(path), []
    right = json.JSONDecoder.raw_decode
    monkeypatch.setattr(
        json.JSONDecoder, "raw_decode", lambda self, *where: parsed.append(where) or right(self, *where)
    )
    assert next(rows.between(600, 601)) == ROWS[600]
    assert len(parsed) == 600 - 512 + 1


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for count in (3, 700):
        path.write_text(json.dumps(ROWS[:count]))
        assert list(json_rows(path).between(0, 999)) == ROWS[:count]


DAMAGED = {
    "cut in an object": (
        '[{"a": 1}, {"a": "some',
        "damaged or cut short behind byte 11: Unterminated string",
    ),
    "cut behind an object": ('[{"a": 1}, {"a": 2}', "cut short at byte 19"),
    "an error in an object": (
        '[{"a": 1}, {"a" 1}, ' + '{"b": 2}, ' * 9 + "]",
        "behind byte 11: Expecting ':'",
    ),
    "a list of numbers": ("[1, 2]", r"byte 1: '1, 2\]?' where an object must begin"),
    "no JSON": ("<html>", "byte 0: '<html>?' where an object must begin"),
    "a list behind the list": ('[{"a": 1}]\n[{"a": 2}]', "the list ends at byte 9 and .* follows"),
    "an object behind the list": ('[{"a": 1}] ' + " " * 9 + '{"a": 2}', "the list ends at byte 9 and"),
    "a number of 5,000 digits": ('[{"a": 1}, {"a": ' + "9" * 5_000 + "}]", "object at byte 11: Exceeds"),
    "a key twice": ('[{"a": 1}, {"b": {"c": 1, "c": 2}}]', "object at byte 11: the key 'c' twice"),
    "nested": ('[{"a": ' + "[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("size_bytes", [5, 2**22])
def test_what_is_no_list_of_objects_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, size_bytes: int
) -> None:
    monkeypatch.setattr(
        module, "_READ_BYTES", 2**22 if len(content := DAMAGED[case][0]) > 1_000 else size_bytes
    )
    message = DAMAGED[case][1]
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=rf"rows.json: .*{message}"):
        json_rows(tmp_path / "rows.json")


def test_an_object_without_an_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", 100)
    monkeypatch.setattr(module, "MAX_OBJECT_CHARACTERS", 1_000)
    path, read = tmp_path / "rows.json", []
    right = module._Text.read
    monkeypatch.setattr(module._Text, "read", lambda self, file: read.append(1) or right(self, file))
    path.write_text('{"a": 1}\n{"b": "' + "x" * 900 + '"}\n{"a": "' + "x" * 100_000)
    with pytest.raises(DataError, match=r"object at byte 919 is longer than 1,000 characters"):
        json_rows(path)
    assert len(read) < 25
    path.write_text('{"a": 1}\n' + " " * 5_000 + '{"b": 2}')
    assert json_rows(path).num_rows == 2, "blanks are no object"


def test_a_file_that_cannot_be_read_or_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: cannot read it: No such file"):
        json_rows(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match=r"bytes.json: text is not UTF-8"):
        json_rows(tmp_path / "bytes.json")
    (tmp_path / "empty.json").write_text("[]")
    assert json_rows(tmp_path / "empty.json").num_rows == 0


WHOLE = {
    "absent": (None, "cannot read it: No such file"),
    "a folder": ("folder", "cannot read it: Is a directory"),
    "bytes": (b'"\xff"', "not JSON in UTF-8"),
    "cut": (b'{"a": ', "not JSON in UTF-8"),
    "a number of 5,000 digits": (b"9" * 5_000, "not JSON in UTF-8: Exceeds"),
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "not JSON in UTF-8: the key 'b' twice"),
    "nested": (b"[" * 100_000, "is nested too deeply"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_file_that_is_read_as_a_whole_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, message = WHOLE[case]
    path = tmp_path / "whole.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=f"whole.json: {message}"):
        read_json(path)


def test_no_layout_reads_json_by_a_road_of_its_own() -> None:
    folder = Path(module.__file__).parent
    others = [path for path in folder.glob("*.py") if path.name != "json_rows.py"]
    assert others
    assert not [path.name for path in others if "json.load" in path.read_text()]
