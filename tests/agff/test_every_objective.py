"""Every objective is exact: ranks, chunks, ZeRO stages and resume compute what one process computes.

A new row of OBJECTIVES needs a file here, tests/agff/objectives/<name>_case.py, with

    OBJECTIVE        an instance, every setting away from its default; without randomness
    prepared(batch)  a batch of tests/agff/tiny.py with what the objective reads beside the items; on two
                     ranks the second has no row that it could use, where rows may be of no use

and where they apply

    AT_DEFAULT       settings that stay at their default: why
    NUM_FINE         fine vectors of the model, else 2
    OF_ELIGIBLE      the metric that is 0 where no row is of use
    RANDOM           an instance that draws random numbers, where it does so
    WITHOUT_EFFECT   parameter: the part of it that changes no output, and why
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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
from agff.grad_cache import random_state
from agff.objectives import OBJECTIVES
from agff.objectives.objective import Objective
from agff.optimizer import build_adamw, build_schedule
from agff.similarity import FusionConfig
from agff.step import train_step
from data_pipeline.collate import TokenBudget
from tests.agff.test_step import NO_IMAGE_ON_RANK_1, NUM_ROWS, NUM_STEPS, OPTIMIZER, PlainEngine, zero_config
from tests.agff.tiny import batch_of, global_rows, tiny_folder, tiny_model
from tests.ranks import run_ranks

FOLDER = Path(__file__).parent / "objectives"


def case_of(name: str) -> Any:
    return importlib.import_module(f"tests.agff.objectives.{name}_case")


def optional(name: str, what: str, otherwise: Any) -> Any:
    return getattr(case_of(name), what, otherwise)


def model_of(name: str, *, lora: bool = False, is_random: bool = False) -> EmbeddingModel:
    head = objective_of(name, is_random).build_head(AutoConfig.from_pretrained(tiny_folder().name))
    return tiny_model(optional(name, "NUM_FINE", 2), lora=lora, head=head)


def objective_of(name: str, is_random: bool = False) -> Objective:
    case = case_of(name)
    return case.RANDOM if is_random else case.OBJECTIVE


def rows_of(name: str, seed: int) -> list[dict]:
    num_fine = optional(name, "NUM_FINE", 2)
    return global_rows(NUM_ROWS, num_fine, rows_without_image=NO_IMAGE_ON_RANK_1, seed=seed)


def batch_for(name: str, rows: list[dict], chunking: int | TokenBudget) -> Batch:
    return case_of(name).prepared(batch_of(rows, chunking, optional(name, "NUM_FINE", 2)))


def own_batch(name: str, chunking: int | TokenBudget, *, seed: int = 0) -> Batch:
    """This rank's share of a global batch."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own = slice(rank * NUM_ROWS // world_size, (rank + 1) * NUM_ROWS // world_size)
    return batch_for(name, rows_of(name, seed)[own], chunking)


# ---------------------------------------------------------------- the cases are what they should be


def test_every_objective_has_a_case() -> None:
    found = {path.name.removesuffix("_case.py") for path in FOLDER.glob("*_case.py")}
    missing = [f"tests/agff/objectives/{name}_case.py" for name in OBJECTIVES if name not in found]
    assert missing == [], f"write {', '.join(missing)}, with what the top of {Path(__file__).name} lists"
    assert found == OBJECTIVES.keys(), "a case without an objective: remove it"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_case_uses_every_setting(name: str) -> None:
    """Also a new one; those that it inherits from another objective are that one's."""
    cls, objective = OBJECTIVES[name], objective_of(name)
    assert isinstance(objective, cls)
    others = [each for each in OBJECTIVES.values() if each is not cls and issubclass(cls, each)]
    inherited = {each.name for other in others for each in dataclasses.fields(other)}
    settings = {each.name for each in dataclasses.fields(cls)} - inherited
    at_default = {setting for setting in settings if getattr(objective, setting) == getattr(cls(), setting)}
    assert at_default == optional(name, "AT_DEFAULT", {}).keys(), (
        f"set them in tests/agff/objectives/{name}_case.py, or say in its AT_DEFAULT why not"
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_two_ranks_the_second_has_no_image_and_nothing_else_of_use(name: str) -> None:
    halves = rows_of(name, 0)[: NUM_ROWS // 2], rows_of(name, 0)[NUM_ROWS // 2 :]
    images = [[row[side][1] for row in half for side in ("query", "target")] for half in halves]
    assert any(image is not None for image in images[0])
    assert all(image is None for image in images[1])
    metric = optional(name, "OF_ELIGIBLE", None)
    if metric is not None:
        first, second = (
            train_step(
                PlainEngine(model_of(name)), objective_of(name), FusionConfig(), batch_for(name, half, 100)
            ).metrics[metric]
            for half in halves
        )
        assert first > 0
        assert second == 0


# ---------------------------------------------------------------- ranks and chunks

CHUNKINGS: dict[int, list[int | TokenBudget]] = {
    1: [1, 4],
    2: [1, 4, 100, TokenBudget(max_tokens=22)],
    4: [1, 100],
}
"""By number of ranks; 100 is the whole local batch. With a budget, and where explicit negatives are on the
first ranks only, the ranks have different numbers of chunks."""
AT_ONCE = {1: 3, 4: 2}
"""Chunks that pass 1 encodes together: with a remainder, and with fillers."""


def gradients(name: str, chunking: int | TokenBudget) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient of every parameter) of one step over this rank's share, in float64."""
    at_once = AT_ONCE.get(chunking, 1) if isinstance(chunking, int) else 2
    engine = PlainEngine(model_of(name), at_once)
    result = train_step(engine, objective_of(name), FusionConfig(), own_batch(name, chunking))
    zero = torch.zeros(())
    return result.loss.item(), {
        key: zero if p.grad is None else p.grad for key, p in engine.model.named_parameters()
    }


def all_gradients() -> dict[tuple[str, int], tuple[float, dict[str, Tensor]]]:
    """By name and place in CHUNKINGS."""
    chunkings = CHUNKINGS[dist.get_world_size() if dist.is_initialized() else 1]
    return {
        (name, place): gradients(name, chunking)
        for name in OBJECTIVES
        for place, chunking in enumerate(chunkings)
    }


@pytest.mark.parametrize("world_size", CHUNKINGS)
def test_ranks_and_chunks_equal_one_process_with_the_full_batch(world_size: int) -> None:
    results = [all_gradients()] if world_size == 1 else run_ranks(all_gradients, world_size=world_size)
    expected_of = {name: gradients(name, 100) for name in OBJECTIVES}
    for (name, place), (_, found) in results[0].items():
        what = f"{name}, chunks of {CHUNKINGS[world_size][place]}"
        expected_loss, expected = expected_of[name]
        mean = sum(result[name, place][0] for result in results) / world_size
        assert mean == pytest.approx(expected_loss, abs=1e-12), what
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-11, msg=f"{what}: {key}")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_has_a_gradient_that_can_be_compared(name: str) -> None:
    _, found = gradients(name, 100)
    assert {key: float(g.abs().max()) for key, g in found.items() if not g.abs().max() > 1e-6} == {}


# ---------------------------------------------------------------- the real engine

CLIP = 0.5


@dataclass(frozen=True)
class EngineCase:
    """One training under the real engine."""

    name: str
    stage: int
    lora: bool
    is_random: bool = False


CASES = [
    EngineCase(name, stage, lora) for name in OBJECTIVES for stage in (1, 2, 3) for lora in (False, True)
]


def random_cases() -> list[EngineCase]:
    names = [name for name in OBJECTIVES if hasattr(case_of(name), "RANDOM")]
    return [EngineCase(name, stage, lora, True) for name in names for stage, lora in ((1, False), (3, True))]


@dataclass(frozen=True)
class Trained:
    """What three steps made on this rank, and whether two steps, a checkpoint and a third one made the
    same."""

    parameters: dict[str, Tensor]
    norms: Sequence[float]
    draws: bool
    """The third step drew random numbers."""
    differs: Sequence[str]
    """After the resumed step."""


def engine_of(case: EngineCase) -> Any:
    from agff.engine import Engine, start_process_group

    device = start_process_group(dist.get_rank())
    return Engine(
        model_of(case.name, lora=case.lora, is_random=case.is_random),
        deepspeed_config=zero_config(case.stage, NUM_ROWS // dist.get_world_size(), clip=CLIP),
        optimizer=OPTIMIZER,
        num_steps=NUM_STEPS,
        autocast_dtype=None,
        device=device,
    )


def whole_parameters(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
        return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def step_with(engine: Any, case: EngineCase, seed: int) -> None:
    batch = own_batch(case.name, 3, seed=seed)
    assert train_step(engine, objective_of(case.name, case.is_random), FusionConfig(), batch).applied


def train(case: EngineCase) -> Trained:
    last, norms = NUM_STEPS - 1, []
    with SharedFolder() as folder:
        engine = engine_of(case)
        torch.manual_seed(1 + dist.get_rank())
        for seed in range(NUM_STEPS):
            if seed == last:
                save_checkpoint(engine, folder, step=last, state={}, trainable_only=case.lora)
                before = random_state()[0]
            step_with(engine, case, seed)
            norms.append(engine.gradient_norm)
        parameters, after = whole_parameters(engine), random_state()[0]
        engine.deepspeed.destroy()
        resumed = engine_of(case)
        restore_checkpoint(resumed, folder, step=last, trainable_only=case.lora)
        step_with(resumed, case, last)
        again = whole_parameters(resumed)
        differs = [key for key in parameters if not torch.equal(again[key], parameters[key])]
        differs += ["the random state"] * (not torch.equal(after, random_state()[0]))
        resumed.deepspeed.destroy()
    return Trained(parameters, norms, not torch.equal(before, after), differs)


def train_all() -> dict[EngineCase, Trained]:
    return {case: train(case) for case in (*CASES, *random_cases())}


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


def reference(case: EngineCase) -> tuple[dict[str, Tensor], list[float]]:
    """(parameters, gradient norms) of three steps in one process with plain torch."""
    model = model_of(case.name, lora=case.lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_adamw(trained, OPTIMIZER)
    optimizer.param_groups[0].update(fused=False, foreach=False)  # the plainest loop of torch's three
    schedule = build_schedule(optimizer, OPTIMIZER, num_steps=NUM_STEPS)
    norms = []

    class Engine(PlainEngine):
        def __init__(self) -> None:
            self.model, self.first_pass_chunks = model, 1

        def step(self) -> bool:
            norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return True

    for seed in range(NUM_STEPS):
        step_with(Engine(), case, seed)
    return {key: p.detach() for key, p in model.named_parameters()}, norms


@pytest.fixture(scope="module")
def trained() -> list[dict[EngineCase, Trained]]:
    return run_ranks(train_all, world_size=2, timeout_s=900)


def with_effect(name: str, key: str, values: Tensor) -> Tensor:
    """A parameter without the part of it that changes no output."""
    unseen = optional(name, "WITHOUT_EFFECT", {}).get(key)
    if unseen is None:
        return values
    is_seen = torch.ones(len(values), dtype=torch.bool)
    is_seen[unseen] = False
    return values[is_seen]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_zero_stages_equal_a_plain_optimizer_after_three_steps(
    trained: list[dict[EngineCase, Trained]], name: str, lora: bool
) -> None:
    expected, norms = reference(EngineCase(name, 0, lora))
    initial = dict(model_of(name, lora=lora).named_parameters())
    assert optional(name, "WITHOUT_EFFECT", {}).keys() <= initial.keys()
    for case in (case for case in CASES if (case.name, case.lora) == (name, lora)):
        found = trained[0][case]
        assert found.norms == pytest.approx(norms, rel=1e-3), case
        assert found.parameters.keys() == expected.keys()
        for key, parameter in initial.items():
            if not parameter.requires_grad:
                assert torch.equal(found.parameters[key], parameter), f"{case} {key} is frozen"
                continue
            before, plain, zero = (
                with_effect(name, key, values)
                for values in (parameter.detach(), expected[key], found.parameters[key])
            )
            assert (plain - before).abs().max() > 1e-4, f"{key} does not move"
            difference = (zero - plain).norm() / (plain - before).norm()
            assert difference < 1e-3, f"{case} {key}: {difference:.1e} of the update"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_takes_the_same_step_bit_for_bit(
    trained: list[dict[EngineCase, Trained]], name: str
) -> None:
    """The random state too; what draws masks and dropout draws others on each rank."""
    for rank, found in enumerate(trained):
        for case, result in found.items():
            if case.name == name:
                assert result.differs == [], f"rank {rank}, {case}"
                assert result.draws == case.is_random, f"rank {rank}, {case}"
