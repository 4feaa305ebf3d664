from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_pipeline import verify_download
from tests.drawings import write_drawings
from tests.mmeb import row, write_subset


def test_each_folder_of_a_download_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subset has a hundred thousand images in one folder."""
    listed: Counter[Path] = Counter()
    right = verify_download._names_in

    def counted(folder: Path) -> set[str]:
        listed[folder] += 1
        return right(folder)

    monkeypatch.setattr(verify_download, "_names_in", counted)
    found = verify_download._check_subset(
        write_drawings(tmp_path / "d").mmeb, "Shapes_i2t", split="original", num_rows=24, deep=False
    )
    assert found.num_images > 10
    assert list(listed.values()) == [1]


def test_a_damaged_page_hides_no_other_finding(tmp_path: Path) -> None:
    write_subset(tmp_path, [row(qry=f"number {number}") for number in range(500)], "Damaged")
    write_subset(tmp_path, [row(pos_text="")], "Other")
    path = tmp_path / "Damaged/original-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    checks, problems = verify_download.check_download(tmp_path, split="original", deep=False, processes=1)
    assert not problems
    assert [len(check.problems) for check in checks.values()] == [1, 1]
    assert checks["Damaged"].problems[0].startswith(f"{path}: damaged parquet file: ")


def test_a_path_that_no_file_can_have_is_a_finding(tmp_path: Path) -> None:
    write_subset(tmp_path, [row(qry="<|image_1|>\nx", qry_image_path="images/\0/a.png")])
    found = verify_download._check_subset(tmp_path, "Sub", split="original", num_rows=1, deep=False)
    assert found.problems == ["Sub: images/\0/a.png is missing (1 rows)"]
