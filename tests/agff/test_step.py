"""The heart: many ranks, chunks and ZeRO stages compute what one process with the whole batch computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from agff.batch import Encoded, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.grad_cache import sides_as_leaves
from agff.joined import encode_joined
from agff.objectives.contrastive import Contrastive
from agff.objectives.objective import Objective
from agff.optimizer import OptimizerConfig, build_adamw, build_schedule
from agff.similarity import FusionConfig
from agff.step import train_step
from data_pipeline.collate import TokenBudget
from tests.agff.three_kinds import ThreeKinds, with_eligible
from tests.agff.tiny import batch_of, global_rows, tiny_family, tiny_model
from tests.ranks import run_ranks

NUM_ROWS = 8
NO_IMAGE_ON_RANK_1 = range(4, 8)
"""The second half of the global batch holds no image at all: with two ranks, all of rank 1."""

CONTRASTIVE = [
    (chunking, Contrastive(amplification=amplification, bidirectional=bidirectional), num_fine)
    for (chunking, (amplification, bidirectional), num_fine) in product(
        (1, 2, 4, 12, TokenBudget(max_tokens=22)), ((0.0, False), (2.0, False), (2.0, True)), (0, 4)
    )
]
TREATED = Contrastive(
    temperature=0.2,
    amplification=2.0,
    bidirectional=True,
    false_negative_margin=0.02,
    num_hardest=3,
    hardness_weight=9.0,
)
"""Drops some, not all: see test_the_treatments_of_the_cases_choose_among_the_candidates."""
NESTED = Contrastive(nested_dims=[5], nested_fine=[0, 2], nested_weights=[0.5, 1.0, 2.0], bidirectional=True)
CASES: list[tuple[int | TokenBudget, Objective, int]] = [
    *CONTRASTIVE,
    *((chunking, NESTED, 4) for chunking in (2, 4)),
    *(
        (chunking, TREATED, num_fine)
        for chunking in (1, 4, TokenBudget(max_tokens=22))
        for num_fine in (0, 4)
    ),
    *((chunking, ThreeKinds(), 4) for chunking in (1, 2, 12, TokenBudget(max_tokens=22))),
]
"""4 items are a whole local batch of two ranks, 12 its queries, targets and negatives. With a budget the
ranks have different numbers of chunks; explicit negatives are on the first ranks only."""


class PlainEngine:
    """float64, no ZeRO: gradients are averaged over ranks by hand, as DeepSpeed does."""

    def __init__(self, model: torch.nn.Module, first_pass_chunks: int = 1) -> None:
        self.model = model.double()
        self.first_pass_chunks = first_pass_chunks

    def encode_together(self, chunks: Sequence[ModelInputs]) -> list[Encoded]:
        return encode_joined(self.encode, chunks, tiny_family())

    def with_image_features(self, chunks: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
        return chunks

    def encode(self, inputs: ModelInputs) -> Encoded:
        return self.model(inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self) -> bool:
        if dist.is_initialized():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        return True


def gradients(chunking: int | TokenBudget, loss: Objective, num_fine: int) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient of every parameter) of one step over this rank's share of the global batch."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rows = global_rows(NUM_ROWS, num_fine, rows_without_image=NO_IMAGE_ON_RANK_1)
    local = rows[rank * NUM_ROWS // world_size : (rank + 1) * NUM_ROWS // world_size]
    # of chunks of one item three at once, of two items two: with a remainder, and with fillers
    at_once = {1: 3, 2: 2}.get(chunking, 1) if isinstance(chunking, int) else 2
    engine = PlainEngine(tiny_model(num_fine, head=loss.build_head(None)), at_once)
    batch = with_eligible(batch_of(local, chunking, num_fine))
    result = train_step(engine, loss, FusionConfig(), batch)
    if isinstance(loss, Contrastive):
        assert result.pair_loss_B.mean().item() == pytest.approx(result.loss.item(), abs=1e-12)
    zero = torch.zeros(())
    return result.loss.item(), {
        name: zero if p.grad is None else p.grad for name, p in engine.model.named_parameters()
    }


def gradients_of_all_cases() -> list[tuple[float, dict[str, Tensor]]]:
    return [gradients(*case) for case in CASES]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_and_chunks_equal_one_process_with_the_full_batch(world_size: int) -> None:
    cases = CASES if world_size == 2 else [case for case in CASES if case[0] != 4]
    worker = gradients_of_all_cases if world_size == 2 else gradients_of_chunks_below_four
    results = run_ranks(worker, world_size=world_size)
    for index, (_, loss, num_fine) in enumerate(cases):
        expected_loss, expected = gradients(NUM_ROWS, loss, num_fine)
        found_loss = sum(result[index][0] for result in results) / world_size
        assert found_loss == pytest.approx(expected_loss, abs=1e-12)
        for name, gradient in expected.items():
            torch.testing.assert_close(results[0][index][1][name], gradient, rtol=1e-8, atol=1e-11, msg=name)
            assert torch.equal(results[0][index][1][name], results[1][index][1][name])
        assert any("visual" in name and gradient.abs().max() > 1e-3 for name, gradient in expected.items())


def gradients_of_chunks_below_four() -> list[tuple[float, dict[str, Tensor]]]:
    return [gradients(*case) for case in CASES if case[0] != 4]


def test_the_cases_exercise_ranks_with_different_numbers_of_chunks_and_negatives() -> None:
    rows = global_rows(NUM_ROWS, 4, rows_without_image=NO_IMAGE_ON_RANK_1)
    batches = [batch_of(part, TokenBudget(max_tokens=22), 4) for part in (rows[:4], rows[4:])]
    assert len(batches[0].chunks) > len(batches[1].chunks)
    assert (batches[0].num_negatives, batches[1].num_negatives) == (3, 0)
    assert any(len(chunk["input_ids"]) > 1 for chunk in batches[0].chunks)


def test_the_treatments_of_the_cases_choose_among_the_candidates() -> None:
    for num_fine in (0, 4):
        batch = batch_of(global_rows(NUM_ROWS, num_fine, rows_without_image=range(4, 8)), NUM_ROWS, num_fine)
        step = partial(train_step, PlainEngine(tiny_model(num_fine)), fusion=FusionConfig(), batch=batch)
        found = [
            step(objective=replace(TREATED, **changes)).metrics["negatives_per_row"].item()
            for changes in ({"false_negative_margin": None, "num_hardest": None}, {"num_hardest": None}, {})
        ]
        assert found[0] > found[1] > found[2] > 1, "the margin drops some, the number some more"


def slow_losses(similarity: Any, rows: list[dict], *, temperature: float) -> list[float]:
    """InfoNCE with explicit negatives by its definition: for each query its own target, all others and all
    negatives."""
    losses = []
    for i, row in enumerate(rows):
        candidates = [
            (similarity(i, "target", j), j == i, r["target_id"], r["query_id"]) for j, r in enumerate(rows)
        ]
        candidates += [
            (similarity(i, "negative", j), False, r["negative_id"], None)
            for j, r in enumerate(rows)
            if "negative" in r
        ]
        kept = [
            s
            for s, is_own, cid, qid in candidates
            if is_own or (cid != row["target_id"] and qid != row["query_id"])
        ]
        total = sum(math.exp(s / temperature) for s in kept)
        losses.append(math.log(total) - candidates[i][0] / temperature)
    return losses


def test_explicit_negatives_are_candidates_of_every_query_but_of_those_whose_target_they_are() -> None:
    rows = global_rows(NUM_ROWS, 0, rows_without_image=NO_IMAGE_ON_RANK_1)
    engine = PlainEngine(tiny_model(0))
    batch = batch_of(rows, NUM_ROWS, 0)
    with torch.no_grad():
        query, target, negative = (
            side["embedding"][:, 0]
            for side in sides_as_leaves(batch, [engine.encode(c) for c in batch.chunks])
        )
    place = {j: k for k, j in enumerate(j for j, r in enumerate(rows) if "negative" in r)}

    def similarity(i: int, side: str, j: int) -> float:
        return float(query[i] @ (target[j] if side == "target" else negative[place[j]]))

    loss = Contrastive(amplification=0, temperature=0.5)
    result = train_step(engine, loss, FusionConfig(), batch)
    expected = slow_losses(similarity, rows, temperature=0.5)
    assert result.pair_loss_B.tolist() == pytest.approx(expected, abs=1e-12)
    assert result.loss.item() == pytest.approx(sum(expected) / NUM_ROWS, abs=1e-12)
    without = [{k: v for k, v in row.items() if not k.startswith("negative")} for row in rows]
    assert sum(slow_losses(similarity, without, temperature=0.5)) < sum(expected) - 0.01, (
        "the negatives matter"
    )


def test_dropout_is_drawn_again_the_same_in_the_second_pass() -> None:
    """With dropout, pass 2 must see the masks of pass 1: then the surrogate's gradient is that of the first
    pass."""

    class Recorder(PlainEngine):
        def __init__(self, model: torch.nn.Module, first_pass_chunks: int = 1) -> None:
            super().__init__(model, first_pass_chunks)
            self.seen: list[Tensor] = []

        def encode(self, inputs: ModelInputs) -> Encoded:
            self.seen.append(torch.rand(()))
            return super().encode(inputs)

    engine = Recorder(tiny_model(0))
    rows = global_rows(4, 0, rows_without_image=range(0))
    train_step(engine, Contrastive(), FusionConfig(), batch_of(rows, 2, 0))
    assert len(engine.seen) == 6 + 5, "queries, targets and negatives in chunks of 2; twice, but the first"
    assert torch.equal(torch.stack(engine.seen[:5]), torch.stack(engine.seen[6:]))
    assert not torch.isin(torch.rand(8), torch.stack(engine.seen)).any(), "the next step draws others"
    with pytest.raises(RuntimeError, match="draws random numbers encoded several chunks at once"):
        train_step(Recorder(tiny_model(0), 2), Contrastive(), FusionConfig(), batch_of(rows, 2, 0))


# ---------------------------------------------------------------- the real engine under ZeRO

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=1, schedule="cosine")
NUM_STEPS = 3
STRICT_ZERO = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""So that a tiny model really is partitioned and gathered."""


def zero_config(stage: int, local_batch_size: int, clip: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": local_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **(STRICT_ZERO if stage == 3 else {})},
        "steps_per_print": 10**9,
    }


def train_with_zero(stage: int, chunk_size: int, kind: str) -> tuple[dict[str, Tensor], list[Any]]:
    """Three optimizer steps on this rank's half; (whole parameters, [(applied, gradient norm)]).

    kind "head": by the objective whose head makes a vector, a loss of a row and a temperature.
    """
    import deepspeed

    from agff.engine import Engine, start_process_group

    world_size, rank = dist.get_world_size(), dist.get_rank()
    local = NUM_ROWS // world_size
    device = start_process_group(rank)
    engine = Engine(
        model_of(kind),
        deepspeed_config=zero_config(stage, local, clip=0.5),
        optimizer=OPTIMIZER,
        num_steps=NUM_STEPS,
        autocast_dtype=None,
        device=device,
        first_pass_chunks=3,
    )
    log = []
    for step in range(NUM_STEPS):
        rows = global_rows(NUM_ROWS, 4, rows_without_image=NO_IMAGE_ON_RANK_1, seed=step)
        batch = with_eligible(batch_of(rows[rank * local : (rank + 1) * local], chunk_size, 4))
        result = train_step(engine, objective_of(kind), FusionConfig(), batch)
        log.append((result.applied, engine.gradient_norm))
    with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
        return {name: p.detach().clone() for name, p in engine.model.named_parameters()}, log


def objective_of(kind: str) -> Objective:
    return ThreeKinds() if kind == "head" else Contrastive(amplification=2.0)


def model_of(kind: str) -> EmbeddingModel:
    return tiny_model(4, lora=kind == "lora", head=objective_of(kind).build_head(None))


ZERO_CASES = [(stage, chunk_size, "full") for stage in (1, 2, 3) for chunk_size in (1, 4, 12)]
ZERO_CASES += [(stage, chunk_size, "head") for stage in (1, 2, 3) for chunk_size in (2, 12)]
ZERO_CASES += [(stage, chunk_size, "lora") for stage in (1, 2, 3) for chunk_size in (1, 4)]
"""With lora the vision tower is frozen: its output of pass 1 is given back, also where two chunks share an
image."""


def train_all_stages() -> dict[Any, tuple[dict[str, Tensor], list[Any]]]:
    return {case: train_with_zero(*case) for case in ZERO_CASES}


def reference_training(kind: str) -> tuple[dict[str, Tensor], list[float]]:
    """The same three steps in one process with plain torch."""
    model = model_of(kind)
    optimizer = build_adamw(model.parameters(), OPTIMIZER)
    optimizer.param_groups[0].update(fused=False, foreach=False)  # the plainest loop of torch's three
    schedule = build_schedule(optimizer, OPTIMIZER, num_steps=NUM_STEPS)
    norms = []

    class Engine:
        encode = staticmethod(model)
        first_pass_chunks = 1
        with_image_features = PlainEngine.with_image_features
        encode_together = PlainEngine.encode_together

        def backward(self, loss: Tensor, is_last: bool) -> None:
            loss.backward()

        def step(self) -> bool:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return True

    for step in range(NUM_STEPS):
        rows = global_rows(NUM_ROWS, 4, rows_without_image=NO_IMAGE_ON_RANK_1, seed=step)
        batch = with_eligible(batch_of(rows, NUM_ROWS, 4))
        train_step(Engine(), objective_of(kind), FusionConfig(), batch)
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def test_zero_stages_equal_a_plain_optimizer_after_three_steps() -> None:
    kinds = ("full", "head", "lora")
    references = {kind: reference_training(kind) for kind in kinds}
    initial_of = {kind: dict(model_of(kind).named_parameters()) for kind in kinds}
    results = run_ranks(train_all_stages, world_size=2)
    for case, (parameters, log) in results[0].items():
        (expected, norms), initial = references[case[-1]], initial_of[case[-1]]
        assert min(norms) > 0.5, "clipping must be at work"
        assert expected.keys() == parameters.keys()
        assert all(applied for applied, _ in log)
        assert [norm for _, norm in log] == pytest.approx(norms, rel=1e-3), case
        trained = [name for name, parameter in initial.items() if parameter.requires_grad]
        assert any("visual" in name for name in trained) == (case[-1] != "lora")
        for name in trained:
            parameter = parameters[name]
            update = (expected[name] - initial[name].detach()).abs().max()
            assert update > 1e-4
            # Adam divides by the root of the second moment: an element whose gradient is rounding noise moves
            # freely
            torch.testing.assert_close(
                parameter, expected[name], rtol=0, atol=float(update) * 2e-2, msg=f"{case} {name}"
            )
            difference = (parameter - expected[name]).norm() / (
                expected[name] - initial[name].detach()
            ).norm()
            assert difference < 1e-3, f"{case} {name}: {difference:.1e} of the update"


POISONED_STEP = 1
POISON_CASES = [
    (stage, precision, clip, value)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for clip, value in ((0.0, math.inf), (0.5, math.nan))
]


def state_of(engine: Any) -> list[Any]:
    """All that a step changes on this rank: model's share, master weights, moments, schedule. Copies."""
    optimizer, schedule = engine.deepspeed.optimizer.optimizer, engine.deepspeed.lr_scheduler
    shares = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
    masters = list(optimizer.state)
    moments = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    assert len(moments) == 3 * len(masters) > 0, "step and both moments"
    rates = [group["lr"] for group in optimizer.param_groups]
    return [*(x.detach().clone() for x in [*shares, *masters, *moments]), rates, schedule.state_dict()]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def train_with_poison(stage: int, precision: Any, clip: float, value: float) -> list[tuple[bool, bool]]:
    """For each step: (applied, whether anything changed). Rank 1 alone sees the value, in one image of the
    poisoned step."""
    from agff.engine import Engine, start_process_group

    rank = dist.get_rank()
    device = start_process_group(rank)
    config = zero_config(stage, NUM_ROWS // 2, clip=clip) | {"bf16": {"enabled": precision == "bf16"}}
    if precision == "bf16" and stage > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # as launcher/run/config.py fills it in
    engine = Engine(
        tiny_model(4),
        deepspeed_config=config,
        optimizer=OPTIMIZER,
        num_steps=3,
        autocast_dtype=None,
        device=device,
    )
    log = []
    for step in range(3):
        rows = global_rows(NUM_ROWS, 4, rows_without_image=range(0), seed=step)
        batch = batch_of(rows[rank * NUM_ROWS // 2 : (rank + 1) * NUM_ROWS // 2], 2, 4)
        if step == POISONED_STEP and rank == 1:
            batch.chunks[0]["pixel_values"][0, 0] = value
        before = state_of(engine) if step else []
        result = train_step(
            engine,
            Contrastive(amplification=2.0),
            FusionConfig(),
            batch,
        )
        log.append((result.applied, step == 0 or not same(before, state_of(engine))))
    return log


def train_with_all_poisons() -> list[list[tuple[bool, bool]]]:
    return [train_with_poison(*case) for case in POISON_CASES]


@pytest.mark.timeout(300)
def test_a_value_on_one_rank_that_is_not_finite_makes_all_ranks_skip_the_step_and_change_nothing() -> None:
    expected = [(step != POISONED_STEP, step != POISONED_STEP) for step in range(3)]
    for rank, found in enumerate(run_ranks(train_with_all_poisons, world_size=2)):
        assert {case: log for case, log in zip(POISON_CASES, found, strict=True) if log != expected} == {}, (
            f"rank {rank}"
        )
