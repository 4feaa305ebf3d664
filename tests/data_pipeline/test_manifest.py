from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from agff.errors import DataError
from data_pipeline.convert import prepare
from data_pipeline.manifest import check_files, read_index, read_manifest
from data_pipeline.storage import LocalFolder
from tests.mmeb import row, write_subset


def test_index_points_at_every_sample(drawings: Path, tmp_path: Path) -> None:
    manifest = prepare(drawings, tmp_path / "out", rows_per_shard=7)
    for name, source in manifest.sources.items():
        index = read_index(LocalFolder(tmp_path / "out"), name, source)
        assert len(index) == source.num_samples
        for shard, offset, size in zip(
            *(index.column(c).to_pylist() for c in ("shard", "offset", "size")), strict=True
        ):
            content = (tmp_path / "out" / name / source.shards[shard].name).read_bytes()[
                offset : offset + size
            ]
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                names = tar.getnames()
            assert len({member.partition(".")[0] for member in names}) == 1


@pytest.mark.parametrize("hashes", [True, False])
def test_missing_and_changed_shards_are_found_once(drawings: Path, tmp_path: Path, hashes: bool) -> None:
    out = tmp_path / "out"
    manifest = prepare(drawings, out, rows_per_shard=10)
    assert check_files(LocalFolder(out), manifest, part=0, num_parts=1, hashes=True) == []
    shards = sorted(out.glob("*/*.tar"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    content = bytearray(shards[2].read_bytes())
    content[600] ^= 1
    shards[2].write_bytes(content)
    found = [
        p
        for part in range(3)
        for p in check_files(LocalFolder(out), manifest, part=part, num_parts=3, hashes=hashes)
    ]
    expected = [(shards[0], "shard is missing; restore it"), (shards[1], "bytes, the manifest says")]
    if hashes:
        expected.append((shards[2], "SHA-256 of the shard is"))
    assert len(found) == len(expected)
    for path, message in expected:
        assert any(problem.startswith(f"{path}: ") and message in problem for problem in found)


@pytest.mark.parametrize(
    "name", ["num_rows", "num_rejected", "most_negatives", "num_regions", "num_left_out"]
)
@pytest.mark.parametrize("value", [-1, "3", None, 1.5])
def test_counts_of_a_manifest_that_are_none_are_refused(tmp_path: Path, name: str, value: object) -> None:
    out = tmp_path / "out"
    write_subset(tmp_path / "mmeb", [row()])
    prepare(tmp_path / "mmeb", out)
    values = json.loads((out / "manifest.json").read_text())
    values["sources"]["Sub"][name] = value
    (out / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"damaged manifest: .*{name}.*{value!r}}} are no counts"):
        read_manifest(LocalFolder(out))


def test_damaged_and_absent_manifests_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards here"):
        read_manifest(LocalFolder(tmp_path))
    for text, message in (
        ("{", "damaged manifest"),
        ('{"format": 9}', "format 9 is not 2"),
        ("[]", "damaged manifest"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=message):
            read_manifest(LocalFolder(tmp_path))
