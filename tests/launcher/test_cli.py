from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from launcher.cli import VERBS, main


def test_every_verb_is_a_program_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, (module, _) in VERBS.items():
        assert callable(import_module(module).main)
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_without_a_known_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "agff convert" in capsys.readouterr().out
    assert main(["dance"]) == 2
    assert "agff convert" in capsys.readouterr().err


def test_a_verb_gets_its_arguments_and_returns_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: neither a run")
