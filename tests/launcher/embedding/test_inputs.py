"""What an input is, and when it is the same as before."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.embedding.inputs import open_corpus
from tests.mmeb import row


def write_table(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True)
    if kind == "json":
        (folder / "t.jsonl").write_text(json.dumps({"image": "a.png"}))
        return folder / "t.jsonl"
    rows = [{"image": "a.png"}] if kind == "parquet" else [row(pos_image_path="a.png")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("kind", ["json", "parquet", "pairs"])
def test_the_same_table_with_other_images_is_another_input(tmp_path: Path, kind: str) -> None:
    """Its vectors are not continued with them; one that moved with its images is."""
    table, other = write_table(tmp_path / "here/in", kind), tmp_path / "other"
    (tmp_path / "here/images").mkdir()
    other.mkdir()
    found = open_corpus(str(table), images=tmp_path / "here/images").fingerprint
    assert open_corpus(str(table), images=other).fingerprint != found
    assert open_corpus(str(table)).fingerprint != found
    (tmp_path / "here").rename(tmp_path / "there")
    table = tmp_path / "there/in" / table.name
    assert open_corpus(str(table), images=tmp_path / "there/images").fingerprint == found
