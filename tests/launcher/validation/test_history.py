"""Which checkpoint is the best, whatever was scored, removed or left behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agff.checkpoint_folder import complete_steps, remove_old_checkpoints
from agff.errors import CheckpointError, StorageError
from launcher.validation.history import HISTORY_FILE, History, open_history


def opened(run: Path, *, keep_best: str | None = "mmeb", start_step: int = 99, sets: str = "a") -> History:
    values: Any = SimpleNamespace(run_dir=run, config=SimpleNamespace(keep_best=keep_best))
    history = open_history(values, cast(Any, SimpleNamespace(fingerprint=sets)), start_step=start_step)
    assert history is not None
    return history


def write_checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / f"checkpoints/step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text("{}")


def record(history: History, scores: dict[int, float], name: str = "mmeb") -> None:
    for step, score in scores.items():
        history.record(step, {name: score})


@pytest.mark.parametrize(
    ("name", "scores", "best"),
    [
        ("mmeb", {1: 10.0, 2: 30.0, 3: 20.0}, 2),
        ("mmeb", {1: 10.0, 2: 30.0, 3: 30.0}, 2),
        ("mmeb", {1: 10.0, 2: 9.722222222222221, 3: 10.000000000000002}, 1),
        ("mmeb", {1: float("nan"), 2: 5.0, 3: float("nan")}, 2),
        ("mmeb", {}, None),
        ("held_out/loss", {1: 3.0, 2: 2.0, 3: 2.5}, 2),
        ("held_out/loss", {1: float("inf"), 2: 2.0, 3: 2.0}, 2),
    ],
)
def test_the_best_is_the_first_of_the_best_finite_scores(
    tmp_path: Path, name: str, scores: dict[int, float], best: int | None
) -> None:
    write_checkpoints(tmp_path, 1, 2, 3)
    record(opened(tmp_path, keep_best=name), scores, name)
    assert opened(tmp_path, keep_best=name).best_step() == best, "a later start knows it too"


def test_it_is_kept_beside_the_newest_and_known_after_a_resume(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for step, score in {1: 10.0, 2: 30.0, 3: 20.0, 4: 25.0, 5: 26.0}.items():
        write_checkpoints(tmp_path, step)
        best = history.best_step()
        remove_old_checkpoints(tmp_path, keep_last=2, keep_every=None, best=best)
        history.record(step, {"mmeb": score})
    assert complete_steps(tmp_path) == [5, 4, 2]
    written = json.loads((tmp_path / HISTORY_FILE).read_text())
    assert (written["keep_best"], written["best_step"], len(written["validations"])) == ("mmeb", 2, 5)
    resumed = opened(tmp_path, start_step=5)
    write_checkpoints(tmp_path, 6)
    resumed.record(6, {"mmeb": 31.0})
    remove_old_checkpoints(tmp_path, keep_last=2, keep_every=None, best=resumed.best_step())
    assert complete_steps(tmp_path) == [6, 5], "the old best goes when another takes its place"


def test_scores_that_do_not_count(tmp_path: Path) -> None:
    """Of steps that the run went back from, of other sets, of checkpoints that are gone, and without the
    wanted name."""
    write_checkpoints(tmp_path, 1, 2, 3)
    history = opened(tmp_path)
    record(history, {1: 10.0, 2: 20.0, 3: 30.0, 4: 40.0})
    assert history.best_step() == 3, "there is no checkpoint of step 4"
    assert opened(tmp_path, start_step=2).best_step() == 2
    assert opened(tmp_path, sets="b").best_step() is None
    assert opened(tmp_path, keep_best="mmvp").best_step() is None
    assert opened(tmp_path, keep_best=None).best_step() is None
    assert opened(tmp_path, start_step=2).has(2)
    assert not opened(tmp_path, start_step=2).has(3)
    assert not opened(tmp_path, sets="b").has(2), "what is asked now was not"


@pytest.mark.parametrize("text", ["{", "[]", '{"validations": [{"step": 1}]}', '{"validations": [3]}'])
def test_a_file_that_is_not_ours_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / HISTORY_FILE).write_text(text)
    with pytest.raises(
        CheckpointError, match=r"validation.json: not what this program writes: .* or remove it"
    ) as caught:
        opened(tmp_path)
    assert caught.value.on_all_ranks


def test_scores_that_cannot_be_written_are_an_error_of_all_ranks(tmp_path: Path) -> None:
    history = opened(tmp_path)
    (tmp_path / HISTORY_FILE).mkdir()
    with pytest.raises(StorageError, match=HISTORY_FILE) as caught:
        history.record(1, {"mmeb": 1.0})
    assert caught.value.on_all_ranks
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_FILE]
