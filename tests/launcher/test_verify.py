from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.convert import prepare
from launcher.verify import main
from tests.data_pipeline.test_verify import change, tar_path
from tests.drawings import write_drawings
from tests.mmeb import contents, row, write_subset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out"


def findings(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--processes", "1"])
    lines = capsys.readouterr().out.splitlines()
    return code, lines[:-1]


def test_an_undamaged_folder_is_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    for options in ([], ["--deep"], ["--repair-index"]):
        assert findings(capsys, folder, *options) == (0, [])
    assert contents(folder) == before


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
    damaged = [tar_path(folder), tar_path(folder, 2), tar_path(folder, source="Shapes_text")]
    for path in damaged:
        (path.parent / "index.arrow").unlink(missing_ok=True)
        change(path, lambda content: content[:600] + bytes([content[600] ^ 1]) + content[601:])
    assert main([str(folder), "--repair-index"]) == 2
    error = capsys.readouterr().err
    assert "the index of Shapes_VQA, Shapes_text can be rebuilt from undamaged shards only:\n" in error
    assert [line.partition(":")[0] for line in error.splitlines()[-3:]] == [str(path) for path in damaged]
    assert not list(folder.glob("*/index.arrow.*")), "nothing was written"
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
    assert any(
        "missing columns qry_image_path, pos_text, pos_image_path; found qry" in line for line in lines
    )
    assert main([str(root), "--repair-index"]) == 2
    assert "it has no index to repair" in capsys.readouterr().err


def test_a_folder_that_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no shards here (manifest.json is missing)" in capsys.readouterr().err
