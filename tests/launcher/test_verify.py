from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline import verify_download
from data_pipeline.convert import prepare
from data_pipeline.manifest import read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from launcher.verify import main
from tests.drawings import write_drawings
from tests.launcher.test_prepare import contents, row, write_subset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out"


def findings(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--processes", "1"])
    lines = capsys.readouterr().out.splitlines()
    return code, lines[:-1]


def tar_path(folder: Path, number: int = 0, source: str = "Shapes_VQA") -> Path:
    return folder / source / f"{source}-{number:05d}.tar"


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def flip_after(mark: bytes) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        place = content.index(mark) + len(mark) + 4
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flip


def test_an_undamaged_folder_is_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    for options in ([], ["--deep"], ["--repair-index"]):
        assert findings(capsys, folder, *options) == (0, [])
    assert contents(folder) == before


def test_a_flipped_bit_names_the_shard_and_each_sample_that_changed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tar_path(folder), flip_after(b"IDAT"))
    code, lines = findings(capsys, folder)
    assert code == 1
    assert re.match(rf"{tar_path(folder)}: SHA-256 of the shard is \w+..., the manifest says", lines[0])
    changed = [
        f"Shapes_VQA-00000.tar:{key:09d}: text or image of the query is not what was written"
        for key in range(4)
    ]
    assert lines[1:] == changed, "four rows use the image that changed"
    _, lines = findings(capsys, folder, "--deep")
    assert any("000000000.query.png: is a damaged PNG" in line for line in lines)


def test_a_flipped_bit_in_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(tar_path(folder), flip_after(b"What c"))
    _, lines = findings(capsys, folder)
    assert len(lines) == 2
    assert re.match(
        r"Shapes_VQA-00000.tar:\d{9}: text or image of the query is not what was written", lines[1]
    )


def test_truncated_missing_and_unknown_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_path(folder, 1).unlink()
    change(tar_path(folder), lambda content: content[:2700])
    shutil.copy(tar_path(folder, 2), tar_path(folder, 77))
    code, lines = findings(capsys, folder)
    assert code == 1
    text = "\n".join(lines)
    assert re.search(
        rf"{tar_path(folder)}: shard has [\d,]+ bytes, the manifest says [\d,]+; restore it", text
    )
    assert re.search(r"Shapes_VQA-00000.tar: not a whole tar file after \d+ samples", text)
    assert re.search(r"Shapes_VQA-00000.tar: \d samples, the manifest says 10", text)
    assert f"{tar_path(folder, 1)}: shard is missing; restore it" in text
    assert f"{tar_path(folder, 77)}: the manifest does not know this shard" in text


def test_a_shard_in_the_place_of_another_is_recognised(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tar_path(folder, 1), tar_path(folder, 0))
    code, lines = findings(capsys, folder)
    assert code == 1
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
def test_members_that_must_not_be(
    folder: Path, capsys: pytest.CaptureFixture[str], rename: Callable[[str], str | None], message: str
) -> None:
    change(tar_path(folder, source="Shapes_text"), lambda content: rewritten(content, rename))
    code, lines = findings(capsys, folder)
    assert code == 1
    assert any(message in line for line in lines), lines
    # whoever trains without verifying meets the same refusal, never another sample's content
    reader = ShardReader(LocalFolder(folder), read_manifest(LocalFolder(folder)))
    if "not a plain member" in message:
        with pytest.raises(Exception, match="not a plain member"):
            reader.read("Shapes_text", 3)


def test_an_index_that_points_elsewhere_is_found_and_rebuilt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = folder / "Shapes_VQA/index.arrow"
    whole = contents(folder)
    for damage in (
        lambda content: content.replace((512 * 6).to_bytes(8, "little"), (512 * 7).to_bytes(8, "little")),
        None,
    ):
        if damage:
            change(index, damage)
        else:
            index.unlink()
        assert contents(folder) != whole
        code, lines = findings(capsys, folder)
        assert code == 1
        assert re.match(rf"{index}: (SHA-256 of the index is|index is missing).*--repair-index", lines[0])
        code, lines = findings(capsys, folder, "--repair-index")
        assert (code, lines) == (0, ["Shapes_VQA: index written, 96 samples"])
        assert contents(folder) == whole, "the same bytes as prepare wrote"


def test_an_index_of_damaged_shards_is_not_rebuilt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "Shapes_VQA/index.arrow").unlink()
    change(tar_path(folder), flip_after(b"IDAT"))
    assert main([str(folder), "--repair-index"]) == 2
    assert "the index of Shapes_VQA can be rebuilt from undamaged shards only" in capsys.readouterr().err
    assert not (folder / "Shapes_VQA/index.arrow").exists()


def test_names_in_a_manifest_cannot_leave_its_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    for name in ("../secret.tar", "/etc/passwd", "a/b.tar", "", ".hidden"):
        values = json.loads(json.dumps(whole))
        values["sources"]["Shapes_VQA"]["shards"][0]["name"] = name
        path.write_text(json.dumps(values))
        assert main([str(folder)]) == 2
        assert f"{name!r} is no file name" in capsys.readouterr().err


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
    folder: Path, capsys: pytest.CaptureFixture[str], old: bytes, new: bytes, message: str
) -> None:
    change(tar_path(folder, source="Shapes_text"), lambda content: content.replace(old, new, 1))
    for options in ([], ["--deep"]):
        code, lines = findings(capsys, folder, *options)
        assert code == 1
        assert any(
            line.startswith("Shapes_text-00000.tar:000000000") and message in line for line in lines
        ), lines


def test_wrong_arguments_and_types_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--processes", "0"]) == 2
    assert capsys.readouterr().err == "error: --processes 0 must be >= 1\n"
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    for key, value in (
        ("num_samples", "6"),
        ("num_samples", -6),
        ("size_bytes", "a"),
        ("size_bytes", None),
        ("sha256", None),
    ):
        values = json.loads(json.dumps(whole))
        values["sources"]["Shapes_VQA"]["shards"][0][key] = value
        path.write_text(json.dumps(values))
        assert main([str(folder)]) == 2
        assert "damaged manifest" in capsys.readouterr().err
    path.write_text("[" * 100_000)
    assert main([str(folder)]) == 2
    assert "damaged manifest" in capsys.readouterr().err


def test_a_download_before_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mmeb"
    mmeb = write_drawings(tmp_path / "d").mmeb
    assert findings(capsys, mmeb)[0] == 0
    (root / "images/some").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images/some/a b.png")
    (root / "images/some/broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    with_image = {"qry": "<|image_1|>\nx"}
    rows = [
        row(**with_image, qry_image_path="images/some/a b.png"),
        row(**with_image, qry_image_path="images/some/gone.png"),
        row(**with_image, qry_image_path="images/some/gone.png"),
        row(**with_image, qry_image_path="images/some/broken.jpg"),
        row(qry="no placeholder", qry_image_path="images/some/a b.png"),
        *(row(**with_image, qry_image_path=f"images/all/{number}.png") for number in range(3)),
    ]
    write_subset(root, rows)
    code, lines = findings(capsys, root)
    assert code == 1
    assert lines[1].split() == ["Sub", "8", "6", "4"]
    assert set(lines[2:]) == {
        "Sub: row 4: qry: <|image_1|> appears 0 times in text 'no placeholder'; beside an image it must "
        "appear once",
        "Sub: images/all: all 3 images are missing; unpack this subset's archive there",
        "Sub: images/some/gone.png is missing (2 rows)",
        "Sub: images/some/broken.jpg: is a damaged JPEG: its header cannot be read",
    }
    _, lines = findings(capsys, root, "--deep")
    assert any(re.match(r"Sub: images/some/broken.jpg: is a damaged JPEG", line) for line in lines), lines
    write_subset(root, [{"qry": "a"}], "Bad")
    _, lines = findings(capsys, root)
    assert any("columns qry_image_path, pos_text, pos_image_path are missing" in line for line in lines)
    assert main([str(root), "--repair-index"]) == 2
    assert "it has no index to repair" in capsys.readouterr().err


def test_each_folder_of_a_download_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subset has a hundred thousand images in one folder."""
    listed: Counter[Path] = Counter()
    right = verify_download._names_in

    def counted(folder: Path) -> set[str]:
        listed[folder] += 1
        return right(folder)

    monkeypatch.setattr(verify_download, "_names_in", counted)
    found = verify_download.check_subset(
        write_drawings(tmp_path / "d").mmeb, "Shapes_i2t", split="original", num_rows=24, deep=False
    )
    assert found.num_images > 10
    assert list(listed.values()) == [1]


def test_a_folder_that_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no shards here (manifest.json is missing)" in capsys.readouterr().err
