"""The quickstart makes its data when a run names them, in whatever way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.command_line import parse_train_arguments
from launcher.quickstart import assemble
from launcher.quickstart.first_use import QUICKSTART_BACKBONE, QUICKSTART_SHARDS, prepare_quickstart_if_named


@pytest.mark.parametrize("spelling", [str, os.path.abspath, "./{}".format])
@pytest.mark.parametrize(
    ("option", "path"), [("--data.shards", QUICKSTART_SHARDS), ("--backbone.path", QUICKSTART_BACKBONE)]
)
def test_absent_data_are_made_for_every_spelling_of_their_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    path: Path,
    spelling: Callable[[Path], str],
) -> None:
    """A stored configuration names it absolute."""

    class AskedError(Exception):
        pass

    def ask(out: Path) -> None:
        raise AskedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble, "prepare_quickstart", ask)
    others = ["--data.shards", "others/shards", "--backbone.path", "others/backbone"]
    prepare_quickstart_if_named(parse_train_arguments(others).config)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AskedError):
        prepare_quickstart_if_named(parse_train_arguments([*others, option, spelling(path)]).config)
    mark = path / ("manifest.json" if path == QUICKSTART_SHARDS else "config.json")
    mark.parent.mkdir(parents=True)
    mark.touch()
    prepare_quickstart_if_named(parse_train_arguments([*others, option, spelling(path)]).config)
