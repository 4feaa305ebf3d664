from __future__ import annotations

from pathlib import Path

import pytest

from agff.errors import DataError
from agff.images import SHARD_FORMATS, decode_image
from data_pipeline.layouts.training_rows import Pair, Side
from data_pipeline.shards import SUFFIX, write_shard
from data_pipeline.verify_download import check_download
from tests.agff.test_images import UNUSABLE
from tests.mmeb import row, write_subset


def test_every_format_has_a_suffix() -> None:
    assert SUFFIX.keys() == set(SHARD_FORMATS)


def test_unusable_images_are_found_by_verify_and_rejected_by_prepare_in_the_same_words(
    tmp_path: Path,
) -> None:
    """Empty files, HTML pages, Git LFS pointers, AVIF: what a download brings under the name of a JPEG."""
    (tmp_path / "images").mkdir()
    for name, (content, _) in UNUSABLE.items():
        (tmp_path / f"images/{name}.jpg").write_bytes(content)
    paths = [f"images/{name}.jpg" for name in UNUSABLE]
    write_subset(tmp_path, [row(qry="<|image_1|>\nx", qry_image_path=path) for path in paths])
    expected = []
    for path in paths:
        with pytest.raises(DataError) as caught:
            decode_image((tmp_path / path).read_bytes(), path, formats=SHARD_FORMATS)
        expected.append(str(caught.value).removeprefix(path))
    for deep in (False, True):
        checks, _ = check_download(tmp_path, split="original", deep=deep, processes=1)
        assert checks["Sub"].problems == [
            f"Sub: {path}{words}" for path, words in zip(paths, expected, strict=True)
        ]
    target = Side(text="t")
    pairs = [Pair(query=Side(text="<|image_1|>\nx", image=tmp_path / path), target=target) for path in paths]
    record = write_shard(tmp_path / "Sub-00000.tar", pairs, first_row=0)
    assert record.num_samples == 0
    assert record.rejected == [
        (number, f"query: image {tmp_path / path}{words}")
        for number, (path, words) in enumerate(zip(paths, expected, strict=True))
    ]
