"""The package without the clone: every file of ours is in the wheel, and a run starts in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launcher.runs import REPOSITORY

PACKAGES = ("agff", "data_pipeline", "launcher", "ds_configs")


def files_of_the_project() -> list[str]:
    """Tracked and new files, without ignored ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in files_of_the_project():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(out.glob("*.whl"))


def test_every_file_of_every_package_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    expected = {name for name in files_of_the_project() if name.split("/")[0] in PACKAGES}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"launcher/recipes/quickstart.yaml", "ds_configs/zero3.json"} <= found
    assert {"launcher/pages/base.html.j2", "launcher/reporting/report.html.j2"} <= found
    assert found == expected


def test_a_run_starts_from_the_installed_package_in_another_folder(
    wheel: Path, project: Path, tmp_path: Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    cache = project / ".cache/quickstart"
    settings = {
        "data.shards": cache / "shards",
        "backbone.path": cache / "backbone",
        "data.weights": "null",
        "data.sub_batch_size": 4,
        "batch.global_batch_size": 8,
        "batch.chunk_size": 2,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "train", *words, "--deepspeed", "zero2", "--dry-run"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "run folder           runs/quickstart-zero2" in result.stdout
    assert list(elsewhere.iterdir()) == []
