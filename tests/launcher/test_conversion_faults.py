"""What goes wrong around a conversion: a full disk, another writer, files that are damaged or gone. Each has
its message, and nothing half-written stays."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agff import files
from agff.checkpoint_folder import STATE_FILE, checkpoint_folder, checkpoint_name
from agff.contract import read_contract
from agff.files import partial_path
from launcher.convert_checkpoint import convert, main
from launcher.run import trained_model
from tests.launcher.runs import change_settings, universal_of

pytestmark = pytest.mark.timeout(600)

BACKBONE = ".cache/quickstart/backbone"


@contextmanager
def room(size_bytes: int) -> Iterator[None]:
    """No file can become larger: as a disk that is full by then, for every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size_bytes", "full_at"),
    [(100, "golden.safetensors"), (4000, "adapter_model.safetensors"), (16000, "tokenizer.json")],
)
def test_a_full_disk_is_named_and_leaves_nothing(
    project: Path,
    lora_run: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size_bytes: int,
    full_at: str,
) -> None:
    """Where each of the libraries that write says it in another way."""
    monkeypatch.chdir(project)
    convert(lora_run[1], tmp_path / "whole", dtype=torch.bfloat16, lora="adapter")
    larger = {path.name for path in (tmp_path / "whole").rglob("*.*") if path.stat().st_size > size_bytes}
    assert full_at in larger
    shutil.rmtree(tmp_path / "whole")
    with room(size_bytes):
        arguments = [str(lora_run[1]), str(tmp_path / "release"), "--lora", "adapter", "--dtype", "bfloat16"]
        assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert f"{tmp_path}/release: cannot be written: " in errors
    assert "too large" in errors
    assert list(tmp_path.iterdir()) == []


def test_the_unfinished_folder_of_another_process_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two containers of one host may have the same number of a process."""
    others = partial_path(tmp_path / "release")
    others.mkdir()
    (others / "file").touch()
    assert main([str(tmp_path / "no-run"), str(tmp_path / "release")]) == 2
    assert f"release: cannot be written: [Errno 17] File exists: '{others}'" in capsys.readouterr().err
    assert (others / "file").exists()


def test_a_conversion_that_is_asked_to_stop_leaves_nothing(
    project: Path, train_once: Callable[[int], tuple[Path, str]], tmp_path: Path
) -> None:
    out = tmp_path / "release"
    command = [sys.executable, "launcher/convert_checkpoint.py", str(train_once(3)[0]), str(out)]
    process = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.01)
    process.terminate()
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_release_is_on_disk_too(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it holds before, so that a power cut leaves all of it or nothing."""
    synced: list[tuple[Path, bool]] = []

    def sync(path: Path) -> None:
        files.sync(path)
        synced.append((path, (tmp_path / "release").exists()))

    monkeypatch.chdir(project)
    monkeypatch.setattr("launcher.convert_checkpoint.sync", sync)
    convert(train_once(3)[0], tmp_path / "release", dtype=torch.float32)
    assert synced.pop() == (tmp_path, True)
    partial = partial_path(tmp_path / "release")
    inside = [path.relative_to(tmp_path / "release") for path in (tmp_path / "release").rglob("*")]
    assert {*synced} == {(partial / path, False) for path in (*inside, "")}


def test_an_older_step_is_released_though_the_newest_is_damaged(
    project: Path,
    lora_run: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the message about the newest one advises."""
    monkeypatch.chdir(project)
    run = tmp_path / "run"
    shutil.copytree(lora_run[1], run)
    (checkpoint_folder(run) / checkpoint_name(4) / STATE_FILE).write_text("{")
    assert main([str(run), str(tmp_path / "release")]) == 2
    assert "the newest checkpoint is damaged (step 4); convert an older one with --step 2" in (
        capsys.readouterr().err
    )
    assert main([str(run), str(tmp_path / "release"), "--step", "2"]) == 0
    assert read_contract(tmp_path / "release").origin["step"] == 2


def test_a_backbone_that_is_gone_meanwhile_is_named(
    project: Path,
    lora_run: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not the folder to write, where there is nothing wrong."""
    monkeypatch.chdir(project)
    run, backbone, out = tmp_path / "run", tmp_path / "backbone", tmp_path / "out" / "release"
    shutil.copytree(lora_run[1], run)
    shutil.copytree(BACKBONE, backbone)
    change_settings(run, "backbone", path=str(backbone))

    def open_and_lose(*arguments: Any, **options: Any) -> trained_model.TrainedRun:
        opened = trained_model.open_run(*arguments, **options)
        (backbone / "model.safetensors").unlink()
        return opened

    monkeypatch.setattr("launcher.convert_checkpoint.open_run", open_and_lose)
    assert main([str(run), str(out)]) == 2
    errors = capsys.readouterr().err
    assert f"error: {backbone}/model.safetensors: cannot be read: No such file" in errors
    assert "cannot be written" not in errors
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_universal_checkpoint_of_zero3_becomes_the_same_release(
    project: Path,
    train_once: Callable[[int], tuple[Path, str]],
    lora_run: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Its tensors are flat."""
    monkeypatch.chdir(project)
    run = lora_run[1] if kind == "lora" else train_once(3)[0]
    universal = universal_of(run, tmp_path / "universal", step=4)
    [flat] = [path for path in universal.glob("zero/*embed_tokens.vectors/fp32.pt")]
    assert torch.load(flat, weights_only=True).ndim == 1
    convert(run, tmp_path / "release", dtype=torch.float32, universal=universal)
    convert(run, tmp_path / "direct", dtype=torch.float32)
    for file in ("backbone/model.safetensors", "prompts.safetensors"):
        found, wanted = load_file(tmp_path / "release" / file), load_file(tmp_path / "direct" / file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[each], wanted[each]) for each in wanted)
    assert read_contract(tmp_path / "release") == read_contract(tmp_path / "direct")
