"""A checkpoint of two ranks, continued on one and on four."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from agff.checkpoint import complete_steps, remove_old_checkpoints, restore_checkpoint, save_checkpoint
from agff.objectives.contrastive import LossConfig, contrastive_loss
from agff.step import train_step
from tests.agff.test_step import NO_IMAGE_ON_RANK_1, NUM_ROWS, OPTIMIZER, zero_config
from tests.agff.tiny import batch_of, global_rows, tiny_model
from tests.ranks import run_ranks

CASES = [(stage, trainable_only) for stage in (1, 2, 3) for trainable_only in (False, True)]
SAVED, NUM_STEPS = 2, 5


def losses(stage: int, trainable_only: bool, folder: Path, start_step: int) -> list[float]:
    """Mean loss over the ranks at steps start_step .. NUM_STEPS - 1; saves at step SAVED of a run from the beginning.

    trainable_only: most parameters are frozen, and left out of the checkpoint, as with an adapter.
    """
    from agff.engine import Engine, start_process_group

    world_size, rank = dist.get_world_size(), dist.get_rank()
    local = NUM_ROWS // world_size
    device = start_process_group(rank)
    model = tiny_model(4)
    if trainable_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0" in name or "prompted" in name)
    engine = Engine(
        model,
        deepspeed_config=zero_config(stage, local, clip=0.5),
        optimizer=OPTIMIZER,
        num_steps=NUM_STEPS,
        precision="fp32",
        device=device,
    )
    if start_step:
        restore_checkpoint(engine, folder, step=start_step, trainable_only=trainable_only)
    objective = partial(contrastive_loss, config=LossConfig(amplification=2.0))
    measured = []
    for step in range(start_step, NUM_STEPS):
        rows = global_rows(NUM_ROWS, 4, rows_without_image=NO_IMAGE_ON_RANK_1, seed=step)
        batch = batch_of(rows[rank * local : (rank + 1) * local], min(2, local), 4)
        loss = train_step(engine, objective, batch).metrics[:1].clone()
        dist.all_reduce(loss)
        measured.append(loss.item() / world_size)
        if step + 1 == SAVED and not start_step:
            save_checkpoint(engine, folder, step=SAVED, state={}, trainable_only=trainable_only)
    return measured


def losses_of_all_cases(folder: Path, start_step: int) -> list[list[float]]:
    return [losses(*case, folder / f"{case[0]}-{case[1]}", start_step) for case in CASES]


@pytest.mark.timeout(600)
def test_another_number_of_ranks_continues_with_the_same_losses(tmp_path: Path) -> None:
    unbroken = run_ranks(losses_of_all_cases, tmp_path, 0, world_size=2)[0]
    for world_size in (1, 4):
        found = run_ranks(losses_of_all_cases, tmp_path, SAVED, world_size=world_size)[0]
        for case, expected, continued in zip(CASES, unbroken, found, strict=True):
            # losses of 3 to 8 in float32; weights, moments, schedule and the step must all have come along
            assert continued == pytest.approx(expected[SAVED:], rel=3e-6), f"{case} on {world_size} ranks"
            assert abs(expected[SAVED] - expected[SAVED - 1]) > 1e-2, "training moves"


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
    remove_old_checkpoints(tmp_path, keep_last=1, keep_every=None)
    assert complete_steps(tmp_path) == [6]
