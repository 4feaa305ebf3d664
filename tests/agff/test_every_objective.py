"""Every objective is exact: ranks, chunks, ZeRO stages and resume compute what one process computes.

A new row of OBJECTIVES needs a file here, tests/agff/objectives/<name>_case.py, with `OBJECTIVE`, an instance
with its options on, and `prepared(batch)`, which adds what it reads to a batch of tests/agff/tiny.py; on two
ranks the second has no row that it could use, where rows may be of no use.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from agff.batch import Batch
from agff.checkpoint import restore_checkpoint, save_checkpoint
from agff.embedding_model import EmbeddingModel
from agff.objectives import OBJECTIVES
from agff.objectives.objective import Objective
from agff.optimizer import build_adamw, build_schedule
from agff.similarity import FusionConfig
from agff.step import train_step
from tests.agff.test_step import NO_IMAGE_ON_RANK_1, NUM_ROWS, NUM_STEPS, OPTIMIZER, PlainEngine, zero_config
from tests.agff.tiny import batch_of, global_rows, tiny_folder, tiny_model
from tests.ranks import run_ranks

NUM_FINE = {"mm_gem": 0, "vein": 0}
"""Of the others 2."""


def case_of(name: str) -> Any:
    return importlib.import_module(f"tests.agff.objectives.{name}_case")


def model_of(name: str, *, lora: bool = False) -> EmbeddingModel:
    objective: Objective = case_of(name).OBJECTIVE
    head = objective.build_head(AutoConfig.from_pretrained(tiny_folder().name))
    return tiny_model(NUM_FINE.get(name, 2), lora=lora, head=head)


def own_batch(name: str, chunk_size: int, *, seed: int = 0) -> Batch:
    """This rank's share of a global batch."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    num_fine = NUM_FINE.get(name, 2)
    rows = global_rows(NUM_ROWS, num_fine, rows_without_image=NO_IMAGE_ON_RANK_1, seed=seed)
    own = rows[rank * NUM_ROWS // world_size : (rank + 1) * NUM_ROWS // world_size]
    return case_of(name).prepared(batch_of(own, chunk_size, num_fine))


def test_every_objective_has_a_case() -> None:
    folder = Path(__file__).parent / "objectives"
    found = {path.name.removesuffix("_case.py") for path in folder.glob("*_case.py")}
    assert found == OBJECTIVES.keys(), "write tests/agff/objectives/<name>_case.py (see the top of this file)"
    for name in OBJECTIVES:
        assert isinstance(case_of(name).OBJECTIVE, OBJECTIVES[name])


# ---------------------------------------------------------------- ranks and chunks

CHUNK_SIZES = {1: [1, 3, 100], 2: [1, 3, 100], 4: [2]}
"""By number of ranks; 100 is the whole local batch."""


def gradients(name: str, chunk_size: int) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient of every parameter) of one step over this rank's share, in float64."""
    engine = PlainEngine(model_of(name))
    batch = own_batch(name, chunk_size)
    result = train_step(engine, case_of(name).OBJECTIVE, FusionConfig(), batch)
    zero = torch.zeros(())
    return result.loss.item(), {
        key: zero if p.grad is None else p.grad for key, p in engine.model.named_parameters()
    }


def all_gradients() -> dict[tuple[str, int], tuple[float, dict[str, Tensor]]]:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return {(name, size): gradients(name, size) for name in OBJECTIVES for size in CHUNK_SIZES[world_size]}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_chunks_equal_one_process_with_the_full_batch(world_size: int) -> None:
    results = [all_gradients()] if world_size == 1 else run_ranks(all_gradients, world_size=world_size)
    expected_of = {name: gradients(name, 100) for name in OBJECTIVES}
    for (name, size), (_, found) in results[0].items():
        expected_loss, expected = expected_of[name]
        mean = sum(result[name, size][0] for result in results) / world_size
        assert mean == pytest.approx(expected_loss, abs=1e-11), (name, size)
        for key, gradient in expected.items():
            torch.testing.assert_close(
                found[key], gradient, rtol=1e-7, atol=1e-10, msg=f"{name}, chunks of {size}: {key}"
            )
    for name, (_, expected) in expected_of.items():
        moved = [key for key, gradient in expected.items() if gradient.abs().max() > 1e-6]
        assert any("visual" in key for key in moved), name
        assert not any("head." in key for key in expected) or any("head." in key for key in moved), name


# ---------------------------------------------------------------- the real engine

ZERO_CASES = [
    (name, stage, lora)
    for name in OBJECTIVES
    for stage, lora in ((1, False), (2, True), (3, False), (3, True))
]


def engine_of(name: str, stage: int, *, lora: bool) -> Any:
    from agff.engine import Engine, start_process_group

    device = start_process_group(dist.get_rank())
    return Engine(
        model_of(name, lora=lora),
        deepspeed_config=zero_config(stage, NUM_ROWS // dist.get_world_size(), clip=0.5),
        optimizer=OPTIMIZER,
        num_steps=NUM_STEPS,
        autocast_dtype=None,
        device=device,
    )


def whole_parameters(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
        return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def step_with(engine: Any, name: str, seed: int) -> None:
    batch = own_batch(name, 3, seed=seed)
    assert train_step(engine, case_of(name).OBJECTIVE, FusionConfig(), batch).applied


def train_all() -> dict[Any, tuple[dict[str, Tensor], bool]]:
    """Of every case the parameters after three steps, and whether a resumed third step gave the same."""
    found = {}
    for name, stage, lora in ZERO_CASES:
        with SharedFolder() as folder:
            engine = engine_of(name, stage, lora=lora)
            for seed in range(NUM_STEPS - 1):
                step_with(engine, name, seed)
            save_checkpoint(engine, folder, step=NUM_STEPS - 1, state={}, trainable_only=lora)
            step_with(engine, name, NUM_STEPS - 1)
            parameters = whole_parameters(engine)
            engine.deepspeed.destroy()
            resumed = engine_of(name, stage, lora=lora)
            restore_checkpoint(resumed, folder, step=NUM_STEPS - 1, trainable_only=lora)
            step_with(resumed, name, NUM_STEPS - 1)
            again = whole_parameters(resumed)
            resumed.deepspeed.destroy()
        found[name, stage, lora] = parameters, all(torch.equal(again[key], parameters[key]) for key in again)
    return found


class SharedFolder:
    """A temporary folder of rank 0 that all ranks know."""

    def __enter__(self) -> Path:
        self.own = tempfile.TemporaryDirectory() if dist.get_rank() == 0 else None
        names: list[Any] = [self.own and self.own.name]
        dist.broadcast_object_list(names, src=0)
        return Path(names[0])

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        if self.own is not None:
            self.own.cleanup()


def reference(name: str, *, lora: bool) -> dict[str, Tensor]:
    """Three steps in one process with plain torch."""
    model = model_of(name, lora=lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_adamw(trained, OPTIMIZER)
    optimizer.param_groups[0].update(fused=False, foreach=False)
    schedule = build_schedule(optimizer, OPTIMIZER, num_steps=NUM_STEPS)

    class Engine(PlainEngine):
        def __init__(self) -> None:
            self.model, self.first_pass_chunks = model, 1

        def step(self) -> bool:
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return True

    for seed in range(NUM_STEPS):
        step_with(Engine(), name, seed)
    return {key: p.detach() for key, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained() -> list[dict[Any, tuple[dict[str, Tensor], bool]]]:
    return run_ranks(train_all, world_size=2, timeout_s=600)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_zero_stages_equal_a_plain_optimizer_after_three_steps(
    trained: list[dict[Any, Any]], name: str, lora: bool
) -> None:
    expected = reference(name, lora=lora)
    initial = {key: p.detach() for key, p in model_of(name, lora=lora).named_parameters()}
    trains = {key for key, p in model_of(name, lora=lora).named_parameters() if p.requires_grad}
    for case in (case for case in ZERO_CASES if case[0] == name and case[2] == lora):
        parameters, _ = trained[0][case]
        assert parameters.keys() == expected.keys()
        for key in trains:
            update = (expected[key] - initial[key]).norm()
            if not update > 0:  # as a head's weights that the batch never uses
                continue
            difference = (parameters[key] - expected[key]).norm() / update
            assert difference < 5e-3, f"{case} {key}: {difference:.1e} of the update"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_takes_the_same_step_bit_for_bit(trained: list[dict[Any, Any]], name: str) -> None:
    assert all(result[case][1] for result in trained for case in ZERO_CASES if case[0] == name)
