from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agff.errors import DataError
from data_pipeline.layouts.text_pairs import TextPairs
from data_pipeline.layouts.training_rows import Pair

ROWS: list[dict[str, Any]] = [
    {"sent0": "A man, asleep.", "sent1": 'He "sleeps".', "hard_neg": "He runs.\nFast."},
    {"sent0": "größer", "sent1": "bigger", "hard_neg": ""},
    {"sent0": "", "sent1": "b", "hard_neg": "c"},
    {"sent0": "a", "sent1": " ", "hard_neg": "c"},
    {"sent0": "a", "sent1": "b <|image_1|>", "hard_neg": "c"},
    {"sent0": "last", "sent1": "one", "hard_neg": "no"},
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> TextPairs:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return TextPairs(root=path, name=path.stem)


@pytest.mark.parametrize("name", ["nli.csv", "nli.parquet"])
def test_a_row_is_two_sentences_and_a_negative_where_there_is_one(tmp_path: Path, name: str) -> None:
    layout = write(tmp_path / name, ROWS)
    assert layout.sources() == ["nli"]
    assert layout.count_rows("nli") == 6
    found = list(layout.rows("nli", start=0, stop=6))
    texts = [tuple(side.text for side in pair.sides) for pair in found if isinstance(pair, Pair)]
    assert texts == [
        ("A man, asleep.", 'He "sleeps".', "He runs.\nFast."),
        ("größer", "bigger"),
        ("last", "one", "no"),
    ]
    assert [reason.partition(" appears")[0] for reason in found if isinstance(reason, str)] == [
        "sent0: is empty",
        "sent1: is empty",
        "sent1: <|image_1|>",
    ]
    for start, stop in ((0, 1), (1, 3), (4, 6), (5, 9)):
        assert list(layout.rows("nli", start=start, stop=stop)) == found[start:stop]


@pytest.mark.parametrize("name", ["nli.csv", "nli.parquet"])
def test_hard_negatives_may_be_absent_and_other_columns_are_ignored(tmp_path: Path, name: str) -> None:
    layout = write(tmp_path / name, [{"id": "1", "sent0": "a", "sent1": "b"}])
    assert layout.count_rows("nli") == 1
    (pair,) = layout.rows("nli", start=0, stop=1)
    assert isinstance(pair, Pair)
    assert [side.text for side in pair.sides] == ["a", "b"]


def test_a_line_with_more_or_fewer_fields_than_the_first_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "nli.csv").write_text("sent0,sent1,hard_neg\na,b,c,d\na\na,b\n")
    found = list(TextPairs(root=tmp_path / "nli.csv", name="nli").rows("nli", start=0, stop=3))
    assert found[:2] == ["more fields than columns: ['d']", "sent1: is empty"]
    assert isinstance(found[2], Pair)


UNREADABLE = {
    "columns.csv": (
        b"premise,hypothesis\na,b\n",
        "first line must name sent0, sent1 .* found premise, hypothesis",
    ),
    "twice.csv": (b"sent0,sent1,sent0\na,b,c\n", "once each; found sent0, sent1, sent0"),
    "empty.csv": (b"", "once each; found "),
    "header.csv": (b"sent0,sent1\n", "no rows; download it again"),
    "latin.csv": (b"sent0,sent1\ngr\xf6\xdfer,b\n", "not a readable CSV file: 'utf-8' codec"),
    "cut.csv": (b'sent0,sent1\na,"b\n', "not a readable CSV file: unexpected end of data"),
    "cut.parquet": (b"PAR1", "cannot read the parquet file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        TextPairs(root=tmp_path / name, name="nli").count_rows("nli")
    with pytest.raises(DataError, match=r"none.csv: cannot read it: No such file"):
        TextPairs(root=tmp_path / "none.csv", name="nli").count_rows("nli")


def test_a_parquet_of_other_columns_is_refused(tmp_path: Path) -> None:
    layout = write(tmp_path / "nli.parquet", [{"sent0": 1, "text": "b"}])
    with pytest.raises(DataError) as caught:
        layout.count_rows("nli")
    assert "missing columns sent1; found sent0, text" in str(caught.value)
    assert "column sent0 holds 1 (int64); it must be text" in str(caught.value)
