"""A run as a person starts it: its scores in TensorBoard, in the log and in its folder."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from agff.checkpoint_folder import complete_steps
from launcher.run.log import MOST_SCORES, RunLog
from launcher.run.stop_request import EXIT_CODE
from tests.launcher.runs import Started, run_command, train_command

pytestmark = pytest.mark.timeout(600)


def written(run: Path) -> dict[str, Any]:
    return json.loads((run / "validation.json").read_text())


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name.startswith("validation/")
    }


def test_scores_are_in_tensorboard_and_in_the_folder(lora_run: tuple[str, Path]) -> None:
    found = written(lora_run[1])
    assert [each["step"] for each in found["validations"]] == [2, 4]
    names = found["validations"][0]["scores"]
    assert {name: len(values) for name, values in scalars(lora_run[1]).items()} == {
        f"validation/{name}": 2 for name in names
    }
    for each in found["validations"]:
        for name, score in each["scores"].items():
            assert (each["step"], pytest.approx(score)) in scalars(lora_run[1])[f"validation/{name}"]
    by_step = {each["step"]: each["scores"]["mmvp"] for each in found["validations"]}
    assert found["keep_best"] == "mmvp"
    assert found["best_step"] == max(by_step, key=by_step.__getitem__)


def test_the_log_says_scores_time_and_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(
        tmp_path,
        measure_speed=lambda report: {},
        start_step=0,
        num_steps=9,
        log_every=1,
        log_samples=False,
        spike_deviations=None,
    )
    many = {"mmeb": 12.5, **{f"mmeb/set{number}": 1.0 for number in range(MOST_SCORES)}}
    with log:
        log.validated(4, {"mmvp": 11.0, "mmvp/Color": 1 / 3}, 2.04, 2)
        log.validated(8, many, 61.0, None)
        log.validated(9, {}, 0.5, None)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")]
    assert said == [
        "validation after step 4 (2.0 s): mmvp 11, mmvp/Color 0.3333; best: step 2",
        "validation after step 8 (61.0 s): mmeb 12.5",
        "validation after step 9 (0.5 s): no scores",
    ]
    assert scalars(tmp_path)["validation/mmvp/Color"] == [(4, pytest.approx(1 / 3))]


@pytest.mark.slow
def test_a_run_stopped_in_its_last_validation_ends_like_an_unbroken_one(project: Path) -> None:
    """And one whose validation was killed; all keep the best checkpoint and the newest."""
    command = f"{train_command(2)} --num_steps 4 --save_every 1 --keep_last 1 --validate_every 1"
    command += " --keep_best mmeb --validation.mmeb_eval .cache/quickstart/data/mmeb_eval"
    folders = {name: project / f"runs/validated-{name}" for name in ("whole", "stopped", "killed")}
    result = run_command(f"{command} --run_dir {folders['whole']}", project)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("validation after step") == 4
    expected = written(folders["whole"])
    for name, number, code in (("stopped", signal.SIGTERM, EXIT_CODE), ("killed", signal.SIGKILL, None)):
        run = folders[name]
        started = Started(f"{command} --run_dir {run}", project)
        started.wait_until((run / "checkpoints/step-000004").exists)
        for rank in started.ranks():
            rank.send_signal(number)
        ended = started.end(120)
        assert ended == code if code is not None else ended != 0
        assert [each["step"] for each in written(run)["validations"]] == [1, 2, 3]
        again = run_command(f"{command} --run_dir {run}", project)
        assert again.returncode == 0, again.stdout
        assert again.stdout.count("validation after step 4") == 1
    for run in folders.values():
        assert written(run) == expected
        assert complete_steps(run) == sorted({4, expected["best_step"]}, reverse=True)
    result = run_command(f"{command} --run_dir {folders['stopped']}", project)
    assert "all 4 steps are done" in result.stdout
