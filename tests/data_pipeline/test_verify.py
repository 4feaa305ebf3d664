from __future__ import annotations

import functools
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agff.errors import DataError
from data_pipeline.convert import prepare
from data_pipeline.manifest import read_manifest, write_index, write_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from data_pipeline.verify import check_folder, in_parallel
from tests.drawings import write_drawings


def findings(folder: Path, *, deep: bool = False) -> list[str]:
    shards = LocalFolder(folder)
    return check_folder(shards, read_manifest(shards), deep=deep, processes=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out"


def tar_path(folder: Path, number: int = 0, source: str = "Shapes_VQA") -> Path:
    return folder / source / f"{source}-{number:05d}.tar"


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def flip_after(mark: bytes) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        place = content.index(mark) + len(mark) + 4
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flip


def test_a_flipped_bit_names_the_shard_and_each_sample_that_changed(folder: Path) -> None:
    change(tar_path(folder), flip_after(b"IDAT"))
    lines = findings(folder)
    assert re.match(rf"{tar_path(folder)}: SHA-256 of the shard is \w+..., the manifest says", lines[0])
    changed = [
        f"Shapes_VQA-00000.tar:{key:09d}: text or image of the query is not what was written"
        for key in range(4)
    ]
    assert lines[1:] == changed, "four rows use the image that changed"
    lines = findings(folder, deep=True)
    assert any("000000000.query.png: is a damaged PNG" in line for line in lines)


def test_a_flipped_bit_in_a_text(folder: Path) -> None:
    change(tar_path(folder), flip_after(b"What c"))
    lines = findings(folder)
    assert len(lines) == 2
    assert re.match(
        r"Shapes_VQA-00000.tar:\d{9}: text or image of the query is not what was written", lines[1]
    )


def test_truncated_missing_and_unknown_shards(folder: Path) -> None:
    tar_path(folder, 1).unlink()
    change(tar_path(folder), lambda content: content[:2700])
    shutil.copy(tar_path(folder, 2), tar_path(folder, 77))
    lines = findings(folder)
    text = "\n".join(lines)
    assert re.search(
        rf"{tar_path(folder)}: shard has [\d,]+ bytes, the manifest says [\d,]+; restore it", text
    )
    assert re.search(r"Shapes_VQA-00000.tar: not a whole tar file after \d+ samples", text)
    assert re.search(r"Shapes_VQA-00000.tar: \d samples, the manifest says 10", text)
    assert f"{tar_path(folder, 1)}: shard is missing; restore it" in text
    assert f"{tar_path(folder, 77)}: the manifest does not know this shard" in text


def test_a_shard_in_the_place_of_another_is_recognised(folder: Path) -> None:
    shutil.copy(tar_path(folder, 1), tar_path(folder, 0))
    lines = findings(folder)
    assert "(these are the bytes of Shapes_VQA/Shapes_VQA-00001.tar)" in lines[0]


def rewritten(content: bytes, rename: Callable[[str], str | None]) -> bytes:
    """The tar with members renamed, or left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old:
            file = old.extractfile(member)
            if (name := rename(member.name)) is not None:
                member.name = name
                new.addfile(member, file)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: name.replace("000000003", "000000009"),
            "Shapes_text-00000.tar:000000009: 2 samples have this key",
        ),
        (
            lambda name: f"../{name}" if name.startswith("000000003") else name,
            "../000000003.json: not a plain member",
        ),
        (
            lambda name: f"/{name}" if name.startswith("000000003") else name,
            "/000000003.json: not a plain member",
        ),
        (lambda name: None if name.startswith("000000003") else name, "9 samples, the manifest says 10"),
        (
            lambda name: name.replace("3.json", "3.txt"),
            "Shapes_text-00000.tar:000000003: member or field 'json' is missing",
        ),
    ],
)
def test_members_that_must_not_be(folder: Path, rename: Callable[[str], str | None], message: str) -> None:
    change(tar_path(folder, source="Shapes_text"), lambda content: rewritten(content, rename))
    lines = findings(folder)
    assert any(message in line for line in lines), lines
    # whoever trains without verifying meets the same refusal, never another sample's content
    reader = ShardReader(LocalFolder(folder), read_manifest(LocalFolder(folder)))
    if "not a plain member" in message:
        with pytest.raises(Exception, match="not a plain member"):
            reader.read("Shapes_text", 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"id":', b'"di":', "text or image of the query is not what was written"),
        (b'"text":', b'"txet":', "text or image of the query is not what was written"),
        (b'"query":', b'"qeury":', "the query is missing"),
        (b'{"row"', b'["row"', "not a sample's record"),
    ],
)
def test_a_record_of_another_shape_is_a_finding_not_a_crash(
    folder: Path, old: bytes, new: bytes, message: str
) -> None:
    change(tar_path(folder, source="Shapes_text"), lambda content: content.replace(old, new, 1))
    for deep in (False, True):
        lines = findings(folder, deep=deep)
        assert any(
            line.startswith("Shapes_text-00000.tar:000000000") and message in line for line in lines
        ), lines


def test_an_index_that_its_own_manifest_contradicts_hides_no_other_finding(folder: Path) -> None:
    manifest = read_manifest(LocalFolder(folder))
    source = manifest.sources["Shapes_text"]
    index = write_index(folder / "Shapes_text", [[(0, 512)]])
    sources = {**manifest.sources, "Shapes_text": replace(source, index=index)}
    write_manifest(folder, replace(manifest, sources=sources))
    tar_path(folder, 1).unlink()
    text = "\n".join(findings(folder))
    assert "Shapes_text/index.arrow: the index has 1 samples, the manifest" in text
    assert f"{tar_path(folder, 1)}: shard is missing" in text


def test_a_checker_that_dies_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match=r"a checker died .*lower --processes"):
        list(in_parallel([functools.partial(os._exit, 9)], 1, "shard"))
