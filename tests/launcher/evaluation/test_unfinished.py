"""An evaluation that was killed continues; one that ended well begins again; two of the same are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import launcher.evaluation.unfinished
from agff.files import locked
from launcher.command_line import INTERRUPTED
from launcher.evaluate import main
from tests.launcher.colours import ColourModel, write_benchmarks
from tests.launcher.test_evaluate_on_ranks import without_dates


class Killed(ColourModel):
    """Stopped when it encodes the set of texts that look for an image."""

    def encode_inputs(self, inputs: Any) -> Tensor:
        if any("Find" in item.text for item in inputs["items"]):
            raise KeyboardInterrupt
        return super().encode_inputs(inputs)


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    return write_benchmarks(tmp_path)


def evaluate(benchmarks: Path, *options: str, model: ColourModel) -> int:
    sets = ["--mmeb_eval", str(benchmarks / "mmeb"), "--mmvp", str(benchmarks / "mmvp")]
    return main([str(benchmarks / "run"), *sets, *options], load=lambda path: model)


def unfinished(benchmarks: Path) -> list[Path]:
    return list((benchmarks / "run").glob(".scores.json.*.unfinished"))


def killed(benchmarks: Path) -> None:
    """After the first set of three."""
    assert evaluate(benchmarks, model=Killed()) == INTERRUPTED


def num_encoded(benchmarks: Path, *options: str, **changes: Any) -> int:
    model = ColourModel()
    for name, value in changes.items():
        setattr(model, name, value)
    assert evaluate(benchmarks, *options, model=model) == 0
    return len(model.encoded)


def test_the_same_command_continues_at_the_set_it_was_in(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(benchmarks)
    (path,) = unfinished(benchmarks)
    assert num_encoded(benchmarks) == 6 + 7  # without the 6 items of I2T
    printed = capsys.readouterr()
    said = "continues an evaluation that was stopped, after I2T; to score all 3 sets again, remove "
    assert f"{said}{path}" in printed.err
    assert printed.out.count("\nI2T  ") == 1
    assert "from earlier runs" not in printed.out
    scores = json.loads((benchmarks / "run/scores.json").read_text())
    assert (scores["num_mmeb_queries"], scores["num_mmvp_pairs"]) == (6, 2)
    assert unfinished(benchmarks) == []
    assert num_encoded(benchmarks, "--out", str(benchmarks / "whole.json")) == 12 + 7
    assert without_dates(scores) == without_dates(json.loads((benchmarks / "whole.json").read_text()))


def test_an_evaluation_that_ended_well_begins_again(benchmarks: Path) -> None:
    assert num_encoded(benchmarks) == num_encoded(benchmarks) == 12 + 7


def other_note(benchmarks: Path) -> None:
    table = benchmarks / "mmeb/sets.json"
    table.write_text(table.read_text().replace("imitate", "copy"))


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--max_queries", "2"], {}),
        (["--similarity", "global"], {}),
        ([], {"weights_sha256": "others"}),
        ([], {}),
    ],
    ids=["queries", "similarity", "weights", "another set"],
)
def test_another_evaluation_does_not_continue_it(
    benchmarks: Path, options: list[str], changes: dict[str, Any]
) -> None:
    killed(benchmarks)
    if not options and not changes:
        other_note(benchmarks)
    assert num_encoded(benchmarks, *options, **changes) > 6 + 7


def test_a_set_that_is_no_longer_in_the_file_is_scored_again(benchmarks: Path) -> None:
    killed(benchmarks)
    (benchmarks / "run/scores.json").unlink()
    assert num_encoded(benchmarks) == 12 + 7


def test_half_a_line_counts_for_nothing(benchmarks: Path) -> None:
    killed(benchmarks)
    (path,) = unfinished(benchmarks)
    path.write_text(path.read_text().rstrip()[:-5])
    assert num_encoded(benchmarks) == 12 + 7


def test_shown_examples_are_printed_after_a_kill_too(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class AtMmvp(ColourModel):
        def encode_inputs(self, inputs: Any) -> Tensor:
            if any("thing" in item.text for item in inputs["items"]):
                raise KeyboardInterrupt
            return super().encode_inputs(inputs)

    assert evaluate(benchmarks, model=AtMmvp()) == INTERRUPTED
    assert num_encoded(benchmarks, "--show", "1") == 6 + 7
    assert 'T2I: "Find red": truth at rank 1 of 3' in capsys.readouterr().out


def test_two_processes_that_score_the_same_into_one_file_are_refused(
    benchmarks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.evaluation.unfinished, "OUTLIVED_S", 0.1)
    killed(benchmarks)
    (path,) = unfinished(benchmarks)
    before = (benchmarks / "run/scores.json").read_bytes()
    with locked(path):
        assert evaluate(benchmarks, model=ColourModel()) == 2
    assert "scores.json: another process scores these sets with these weights" in capsys.readouterr().err
    assert (benchmarks / "run/scores.json").read_bytes() == before
    assert evaluate(benchmarks, model=ColourModel()) == 0
