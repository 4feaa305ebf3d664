"""A checkpoint of two ranks, continued on four; and one of those four, continued on one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import agff.files
from agff.checkpoint import _written_files, newest_intact_step, restore_checkpoint, save_checkpoint
from agff.checkpoint_folder import complete_steps, remove_old_checkpoints, remove_unfinished
from agff.errors import CheckpointError
from agff.objectives.contrastive import Contrastive
from agff.similarity import FusionConfig
from agff.step import train_step
from tests.agff.test_step import NO_IMAGE_ON_RANK_1, NUM_ROWS, OPTIMIZER, zero_config
from tests.agff.tiny import batch_of, global_rows, tiny_model
from tests.ranks import run_ranks

CASES = [(stage, lora) for stage in (1, 2, 3) for lora in (False, True)]
NUM_STEPS = 5


def losses(stage: int, lora: bool, folder: Path, start_step: int, save_step: int | None) -> list[float]:
    """Mean loss over the ranks at steps start_step .. NUM_STEPS - 1, and a checkpoint after `save_step` of
    them.

    lora: only adapters and soft tokens train, and the rest is left out of the checkpoint.
    """
    from agff.engine import Engine, start_process_group

    world_size, rank = dist.get_world_size(), dist.get_rank()
    local = NUM_ROWS // world_size
    device = start_process_group(rank)
    config = zero_config(stage, local, clip=0.5)
    config["zero_optimization"]["sub_group_size"] = 500  # several groups of parameters on each rank
    engine = Engine(
        tiny_model(4, lora=lora),
        deepspeed_config=config,
        optimizer=OPTIMIZER,
        num_steps=NUM_STEPS,
        autocast_dtype=None,
        device=device,
    )
    if start_step:
        restore_checkpoint(engine, folder, step=start_step, trainable_only=lora)
    objective = Contrastive(amplification=2.0)
    measured = []
    for step in range(start_step, NUM_STEPS):
        rows = global_rows(NUM_ROWS, 4, rows_without_image=NO_IMAGE_ON_RANK_1, seed=step)
        batch = batch_of(rows[rank * local : (rank + 1) * local], min(2, local), 4)
        loss = train_step(engine, objective, FusionConfig(), batch).loss.clone()
        dist.all_reduce(loss)
        measured.append(loss.item() / world_size)
        if step + 1 == save_step:
            save_checkpoint(engine, folder, step=save_step, state={}, trainable_only=lora)
    return measured


def losses_of_all_cases(folder: Path, start_step: int, save_step: int | None) -> list[list[float]]:
    return [losses(*case, folder / f"{case[0]}-{case[1]}", start_step, save_step) for case in CASES]


@pytest.mark.slow  # of one stage, a whole run does it in every test run (tests/launcher/test_train.py)
@pytest.mark.timeout(600)
def test_another_number_of_ranks_continues_with_the_same_losses(tmp_path: Path) -> None:
    unbroken = run_ranks(losses_of_all_cases, tmp_path, 0, 2, world_size=2)[0]
    for world_size, start_step, save_step in ((4, 2, 3), (1, 3, None)):  # the last continues the four ranks
        found = run_ranks(losses_of_all_cases, tmp_path, start_step, save_step, world_size=world_size)[0]
        for case, expected, continued in zip(CASES, unbroken, found, strict=True):
            # losses of 3 to 8 in float32; weights, moments, schedule and the step must all have come along
            assert continued == pytest.approx(expected[start_step:], rel=3e-6), (
                f"{case} on {world_size} ranks"
            )
            assert abs(expected[start_step] - expected[start_step - 1]) > 1e-2, "training moves"


def test_retention_and_half_written_checkpoints(tmp_path: Path) -> None:
    for step in range(1, 8):
        folder = tmp_path / f"checkpoints/step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    (tmp_path / "checkpoints/step-000007/state.json").unlink()
    (tmp_path / "checkpoints/step-000008.partial").mkdir()
    assert complete_steps(tmp_path) == [6, 5, 4, 3, 2, 1]
    remove_old_checkpoints(tmp_path, keep_last=None, keep_every=None)
    assert complete_steps(tmp_path) == [6, 5, 4, 3, 2, 1]
    remove_old_checkpoints(tmp_path, keep_last=2, keep_every=3)
    assert complete_steps(tmp_path) == [6, 5, 3]
    remove_old_checkpoints(tmp_path, keep_last=1, keep_every=None, best=3)
    assert complete_steps(tmp_path) == [6, 3]
    remove_old_checkpoints(tmp_path, keep_last=1, keep_every=None)
    assert complete_steps(tmp_path) == [6]


def write_checkpoint(run: Path, step: int, *, is_damaged: bool) -> None:
    """As small as one can be: a file of two bytes and its hash."""
    folder = run / f"checkpoints/step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "file").write_text("no" if is_damaged else "ok")
    digest = hashlib.sha256(b"ok").hexdigest()
    (folder / "state.json").write_text(
        json.dumps({"step": step, "world_size": 2, "files": {"file": f"2 bytes, sha256 {digest}"}})
    )


def found_steps(runs: list[Path]) -> list[int | str | None]:
    """What is found in each run; last, what was shown on stderr when every hash counts as slow."""
    agff.files.SILENT_S = 0
    found: list[int | str | None] = []
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        for run in runs:
            try:
                found.append(newest_intact_step(run, device=torch.device("cpu")))
            except CheckpointError as error:
                found.append(f"{error}; on all ranks: {error.on_all_ranks}")
    return [*found, shown.getvalue()]


def test_damaged_checkpoints_are_set_aside_and_a_run_without_an_intact_one_does_not_begin_anew(
    tmp_path: Path,
) -> None:
    runs = [tmp_path / name for name in ("empty", "some", "none")]
    for step, is_damaged in ((10, False), (20, False), (30, True), (40, True)):
        write_checkpoint(runs[1], step, is_damaged=is_damaged)
        write_checkpoint(runs[2], step, is_damaged=True)
    (runs[1] / "checkpoints/step-000040/state.json").write_text("{")
    for rank, (empty, some, none, shown) in enumerate(run_ranks(found_steps, runs, world_size=2)):
        assert ("check step-000020: 100%" in shown) == (rank == 0)
        assert (empty, some) == (None, 20)
        assert "all of the 4 checkpoints are damaged or cannot be read" in none
        assert none.endswith("on all ranks: True")
    assert complete_steps(runs[1]) == [20, 10]
    assert {path.name for path in (runs[1] / "checkpoints").glob("*.damaged")} == {
        "step-000030.damaged",
        "step-000040.damaged",
    }
    assert complete_steps(runs[2]) == [40, 30, 20, 10], "nothing is touched"


def test_what_killed_saves_left_is_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10, is_damaged=False)
    for name in ("step-000012.partial", "step-000010.universal", "step-000004.removed"):
        (tmp_path / "checkpoints" / name).mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


def files_seen_late(folder: Path) -> list[str]:
    rank = dist.get_rank()
    if rank == 1:
        time.sleep(1)
    for name in (f"random-{rank:05d}.pt", f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"):
        (folder / name).touch()
    return _written_files(folder, zero_stage=2)


def test_files_of_other_machines_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_ranks(files_seen_late, tmp_path, world_size=2)
    assert first == second
    assert len(first) == 4
    monkeypatch.setattr("agff.checkpoint.LATE_FILES_S", 0)
    (tmp_path / "random-00000.pt").unlink()
    (tmp_path / "random-00001.pt").unlink()
    with pytest.raises(CheckpointError, match="does not see the files of all 1 ranks"):
        _written_files(tmp_path, zero_stage=2)
