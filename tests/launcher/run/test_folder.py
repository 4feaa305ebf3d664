"""Who may train in a run's folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agff.errors import AgffError, CheckpointError, ConfigError
from data_pipeline.plan import RANK_ROWS, Mixture, Plan
from launcher.command_line import report
from launcher.run.config import ResolvedRun
from launcher.run.folder import (
    check_data_plan,
    check_run_folder,
    check_run_folder_together,
    hold_run_folder,
)
from tests.data_pipeline.test_plan import manifest


def hold(folder: Path, held: Event) -> None:
    with hold_run_folder(folder, patience_s=0):
        if os.fork() == 0:  # as a loader's process, which outlives a killed rank for a moment
            time.sleep(3)
            os._exit(0)
        held.set()
        time.sleep(60)


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(
            ConfigError, match=rf"process {other.pid}\); .*or delete .*run/.lock if"
        ) as caught:
            hold_run_folder(tmp_path / "run", patience_s=0).__enter__()
        assert caught.value.on_all_ranks
        other.kill()
        other.join()
        with hold_run_folder(tmp_path / "run", patience_s=0):
            pass
    finally:
        other.kill()


@pytest.mark.parametrize(
    ("rank", "local_rank", "shared", "said"),
    [
        ("0", "0", False, "error: it"),
        ("0", "0", True, "error: it"),
        ("8", "0", False, "error on rank 8 ("),
        ("8", "0", True, ""),
        ("9", "1", False, ""),
    ],
)
def test_an_error_is_said_once_or_once_a_machine(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: str,
    local_rank: str,
    shared: bool,
    said: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    error = AgffError("it")
    assert report(error.shared() if shared else error) == 2
    found = capfd.readouterr().err.lstrip()
    assert found.startswith(said)
    assert bool(found) == bool(said)


def run_in(folder: Path, **data: Any) -> ResolvedRun:
    """As much of a run as the checks of its folder read."""
    settings = SimpleNamespace(accept_changes=data.get("accept_changes", False))
    return cast(Any, SimpleNamespace(run_dir=folder, config=SimpleNamespace(data=settings)))


def test_a_run_folder_that_is_a_file_or_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"file is a file; choose another --run_dir"):
        check_run_folder(run_in(file))
    with (
        pytest.raises(
            ConfigError, match=r"file/run: cannot write there: .*choose another --run_dir"
        ) as caught,
        hold_run_folder(file / "run", patience_s=0),
    ):
        pass
    assert caught.value.on_all_ranks


@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("state", [{}, {"data_plan": None}, {"data_plan": []}])
def test_a_checkpoint_without_a_data_plan_is_refused_on_all_ranks(
    tmp_path: Path, state: dict[str, Any], accepts: bool
) -> None:
    checkpoint = tmp_path / "checkpoints/step-000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 4, "world_size": 2, **state}))
    with pytest.raises(CheckpointError, match=r"state\.json: data_plan missing, an older version") as caught:
        check_data_plan(run_in(tmp_path, accept_changes=accepts), {}, step=4)
    assert caught.value.on_all_ranks


@pytest.mark.parametrize("old_rows", [None, "consecutive", RANK_ROWS])
def test_a_checkpoint_of_the_old_order_of_rows_is_continued_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old_rows: str | None
) -> None:
    """Its global batches are the same; versions before the rule was stored took consecutive rows."""
    sizes, mixture = manifest(a=[5, 5]), Mixture(sub_batch_size=2)
    description = Plan(sizes, mixture, seed=0, global_batch_size=8).description
    old = {**description, "rank_rows": old_rows} if old_rows else dict(description)
    if old_rows is None:
        del old["rank_rows"]
    checkpoint = tmp_path / "checkpoints/step-000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 4, "world_size": 2, "data_plan": old}))
    check_data_plan(run_in(tmp_path), description, step=4)
    expected = (
        r"the checkpoint of step 4 is of a version whose ranks took other rows of the same global batches "
        r"\(now rank::world_size\)\. The run continues with the same samples .* not bit for bit"
    )
    assert len(caplog.messages) == (old_rows != RANK_ROWS)
    assert all(re.search(expected, message) for message in caplog.messages)
    with pytest.raises(ConfigError, match=r"the order of the data changed since step 4: seed: 0 -> 1\."):
        check_data_plan(run_in(tmp_path), {**description, "seed": 1}, step=4)


def test_a_state_that_cannot_be_read_is_raised_on_all_ranks(tmp_path: Path) -> None:
    """One rank alone may not see the file: the others would wait for it."""
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read") as caught:
        check_data_plan(run_in(tmp_path), {}, step=4)
    assert caught.value.on_all_ranks
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(AgffError, match=r"config\.yaml") as caught:
        check_run_folder_together(run_in(tmp_path))
    assert caught.value.on_all_ranks
