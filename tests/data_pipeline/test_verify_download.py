from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_pipeline import verify_download
from tests.drawings import write_drawings


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
