"""Hashing a file reports its bytes, and nothing is shown while it is quick; a failed write leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

import agff.files
from agff.files import changed_files, hashing_bar, locked, sha256_of, write_text


@pytest.mark.parametrize("size", [0, 1, 2**18, 700_001])
def test_progress_counts_every_byte_and_changes_no_hash(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(index % 251 for index in range(size)))
    counts: list[int] = []
    assert sha256_of(path, progress=counts.append) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256_of(path) == sha256_of(path, progress=counts.append)
    assert sum(counts) == 2 * size
    assert len(counts) >= 2 * size / 2**20, "a large file is reported in parts"


def test_bar_appears_only_when_it_takes_long_and_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for silent_s, is_shown in ((5, True), (0, False), (0, True)):
        monkeypatch.setattr(agff.files, "SILENT_S", silent_s)
        with hashing_bar("check shards", 2_000_000, is_shown=is_shown) as bar:
            bar.update(2_000_000)
        shown = capsys.readouterr().err
        assert ("check shards: 100%" in shown and "2.00M/2.00M" in shown) == (is_shown and not silent_s)
        assert bool(shown) == (is_shown and not silent_s)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/dev/zero"])
def test_names_that_lead_out_of_the_folder_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "release").mkdir()
    problems = changed_files(tmp_path / "release", {name: "0 bytes"})
    assert problems == [f"{tmp_path}/release: {name!r} is not the name of a file in it"]


def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file.json", "old")]


def test_who_waited_for_a_file_that_its_holder_removed_holds_it_alone(tmp_path: Path) -> None:
    path, waits, ends = tmp_path / "lock", threading.Event(), threading.Event()
    order: list[str] = []

    def second() -> None:
        waits.set()
        with locked(path):
            order.append("second")
            assert ends.wait(60)

    waiting = threading.Thread(target=second)
    with locked(path):
        waiting.start()
        assert waits.wait(60)
        while len(_open_at(path)) < 2:
            pass
        path.unlink()
        order.append("first")
    while len(order) < 2:
        assert waiting.is_alive()
    with locked(path, wait=False) as is_mine:
        assert not is_mine, "a third one that comes later"
    ends.set()
    waiting.join(60)
    assert order == ["first", "second"]


def _open_at(path: Path) -> list[str]:
    """Descriptors of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the list itself
            continue
    return [link for link in found if link == str(path)]
