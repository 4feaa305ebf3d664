"""The distillation loss: its definition as a loop, its gradient, ranks, equal texts, the fused similarity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import agff
from agff.batch import Batch
from agff.collectives import rank, world_size
from agff.errors import ConfigError
from agff.objectives import distillation
from agff.objectives.distillation import Direction, Distillation, rank_correlation
from agff.similarity import FusionConfig
from tests.agff.objectives.distillation_case import prepared, teacher_vectors
from tests.ranks import run_ranks

DIRECTIONS: tuple[Direction, ...] = ("teacher_student", "student_teacher")
CHOICES = list(product(DIRECTIONS, (False, True)))

Similarity = Callable[[Tensor, Tensor], float]


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1
    )


def slow_rows(
    student: Tensor,
    teacher: Tensor,
    same: Callable[[int, int], bool],
    similarity: Similarity,
    *,
    temperature: float,
    direction: Direction,
    diagonal: bool,
) -> list[float]:
    """The definition, one number at a time."""
    losses = []
    for i in range(len(student)):
        columns = [j for j in range(len(student)) if diagonal or not same(i, j)]
        p = softmax([float(teacher[i] @ teacher[j]) / temperature for j in columns])
        q = softmax([similarity(student[i], student[j]) / temperature for j in columns])
        first, second = (p, q) if direction == "teacher_student" else (q, p)
        losses.append(sum(a * math.log(a / b) for a, b in zip(first, second, strict=True)))
    return losses


def softmax(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


def dot(a: Tensor, b: Tensor) -> float:
    return float(a @ b)


def slow_fused(beta: float) -> Similarity:
    """METHOD: four patterns, log-mean-exp inside each, log-sum-exp over them."""

    def similarity(a_MD: Tensor, b_MD: Tensor) -> float:
        def soft(pairs: list[tuple[Tensor, Tensor]]) -> float:
            return beta * math.log(sum(math.exp(dot(x, y) / beta) for x, y in pairs) / len(pairs))

        u, f, v, g = a_MD[0], list(a_MD[1:]), b_MD[0], list(b_MD[1:])
        patterns = [soft([(u, v)]), soft([(x, v) for x in f]), soft([(u, y) for y in g])]
        patterns.append(soft([(x, y) for x in f for y in g]))
        return beta * math.log(sum(math.exp(s / beta) for s in patterns) / 4)

    return similarity


@pytest.mark.parametrize(("direction", "diagonal"), CHOICES)
@pytest.mark.parametrize("rows_of_block", [1, 3, 100])
def test_the_loss_equals_the_loop(
    direction: Direction, diagonal: bool, rows_of_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = unit(7, 5, seed=0), unit(7, 4, seed=1)
    monkeypatch.setattr(distillation, "BLOCK_ELEMENTS", 7 * rows_of_block)
    choices: dict[str, Any] = {"temperature": 0.1, "direction": direction, "diagonal": diagonal}
    expected = slow_rows(student, teacher, lambda i, j: i == j, dot, **choices)
    found = agff.distillation_loss(student, teacher, **choices)
    assert found.item() == pytest.approx(sum(expected) / 7, rel=1e-12)


def test_the_choices_differ_and_the_default_leaves_the_row_itself_out() -> None:
    student, teacher = unit(7, 5, seed=0), unit(7, 4, seed=1)
    losses = {
        choice: agff.distillation_loss(
            student, teacher, temperature=0.1, direction=choice[0], diagonal=choice[1]
        )
        for choice in CHOICES
    }
    assert len({round(loss.item(), 6) for loss in losses.values()}) == len(CHOICES)
    assert agff.distillation_loss(student, teacher, temperature=0.1) == losses["teacher_student", False]


@pytest.mark.parametrize(("direction", "diagonal"), CHOICES)
def test_gradcheck(direction: Direction, diagonal: bool) -> None:
    student, teacher = unit(5, 3, seed=2).requires_grad_(), unit(5, 4, seed=3).requires_grad_()

    def loss(student: Tensor) -> Tensor:
        return agff.distillation_loss(
            student, teacher, temperature=0.3, direction=direction, diagonal=diagonal
        )

    assert torch.autograd.gradcheck(loss, student)
    loss(student).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_that_compares_as_its_teacher_has_no_loss_and_no_gradient(direction: Direction) -> None:
    student = unit(6, 4, seed=4).requires_grad_()
    rotated = student.detach() @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    loss = agff.distillation_loss(student, rotated, temperature=0.05, direction=direction)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_a_row_alone_has_no_loss_and_no_gradient() -> None:
    student = unit(1, 4, seed=5).requires_grad_()
    loss = agff.distillation_loss(student, unit(1, 3, seed=6), temperature=0.05)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_vectors_are_compared_in_float32(dtype: torch.dtype) -> None:
    student, teacher = unit(6, 4, seed=7).to(dtype), unit(6, 4, seed=8).to(dtype)
    loss = agff.distillation_loss(student, teacher, temperature=0.05)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        agff.distillation_loss(student.double(), teacher.double(), temperature=0.05).item(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"direction": "both"}, "direction='both' must be one of teacher_student, student_teacher"),
        ({"teacher_NE": torch.ones(3, 2)}, r"expected \(N, D\) and \(N, E\), got \(4, 2\) and \(3, 2\)"),
        ({"student_ND": torch.ones(4, 1, 2)}, r"got \(4, 1, 2\) and \(4, 2\)"),
    ],
)
def test_a_wrong_call_is_refused(change: dict[str, Any], message: str) -> None:
    call = {"student_ND": torch.ones(4, 2), "teacher_NE": torch.ones(4, 2), "temperature": 0.1} | change
    with pytest.raises(ValueError, match=message):
        agff.distillation_loss(**call)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "loss.temperature=0.0 must be > 0"),
        ({"direction": "both"}, "loss.direction='both' must be one of teacher_student, student_teacher"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(**settings)


# ---------------------------------------------------------------- the objective


def batch_of_ids(query_ids: list[int], target_ids: list[int]) -> Batch:
    pairs = len(query_ids)
    return prepared(
        Batch(
            chunks=(),
            row_of_item_R=torch.arange(2 * pairs),
            query_ids_B=torch.tensor(query_ids),
            target_ids_B=torch.tensor(target_ids),
            negative_ids_N=torch.zeros(0, dtype=torch.int64),
            addresses=("",) * pairs,
            filler={},
        )
    )


QUERY_IDS, TARGET_IDS = [1, 2, 3, 1], [11, 12, 2, 11]
"""1 and 11 occur twice on the same side, 2 on both sides; on two ranks on different ones."""


def embedding_of(ids: list[int], num_vectors: int) -> Tensor:
    """Equal texts have equal vectors."""
    return torch.stack([unit(num_vectors, 5, seed=number) for number in ids])


def objective_step(
    choices: tuple[Literal["teacher_student", "student_teacher"], bool], num_vectors: int
) -> tuple[float, Tensor, Tensor, dict[str, float]]:
    """(loss, gradient of the queries and of the targets, metrics) of this rank's share."""
    local = slice(rank() * 4 // world_size(), (rank() + 1) * 4 // world_size())
    query, target = (
        {"embedding": embedding_of(ids[local], num_vectors).requires_grad_()}
        for ids in (QUERY_IDS, TARGET_IDS)
    )
    objective = Distillation(temperature=0.2, direction=choices[0], diagonal=choices[1])
    batch = batch_of_ids(QUERY_IDS[local], TARGET_IDS[local])
    result = objective(query, target, {}, batch, FusionConfig(beta=0.1))
    result.loss.backward()
    gradients = [side["embedding"].grad for side in (query, target)]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert result.pair_loss_B.mean().item() == pytest.approx(result.loss.item())
    metrics = {name: value.item() for name, value in result.metrics.items()}
    return result.loss.item(), gradients[0], gradients[1], metrics


CASES = list(product(CHOICES, (1, 3)))


def objective_steps() -> list[tuple[float, Tensor, Tensor, dict[str, float]]]:
    return [objective_step(*case) for case in CASES]


@pytest.mark.parametrize(("choices", "num_vectors"), CASES)
def test_the_objective_equals_the_loop_over_all_texts(
    choices: tuple[Direction, bool], num_vectors: int
) -> None:
    ids = [*QUERY_IDS, *TARGET_IDS]
    teacher = torch.nn.functional.normalize(teacher_vectors(torch.tensor(ids)).double(), dim=-1)
    fused = slow_fused(0.1) if num_vectors > 1 else lambda a, b: dot(a[0], b[0])
    expected = slow_rows(
        embedding_of(ids, num_vectors),
        teacher,
        lambda i, j: ids[i] == ids[j],
        fused,
        temperature=0.2,
        direction=choices[0],
        diagonal=choices[1],
    )
    loss, *_ = objective_step(choices, num_vectors)
    assert loss == pytest.approx(sum(expected) / len(ids), rel=1e-5)  # the teacher is float32


def test_two_ranks_equal_one_process() -> None:
    ranks = run_ranks(objective_steps, world_size=2)
    for index, case in enumerate(CASES):
        loss, query, target, metrics = objective_step(*case)
        own = [steps[index] for steps in ranks]
        assert sum(step[0] for step in own) / 2 == pytest.approx(loss, abs=1e-12)
        for found, expected in ((1, query), (2, target)):
            gathered = torch.cat([step[found] for step in own]) / 2  # ZeRO averages over ranks
            torch.testing.assert_close(gathered, expected, rtol=1e-8, atol=1e-11)
        for name, value in metrics.items():
            assert sum(step[3][name] for step in own) / 2 == pytest.approx(value, abs=1e-6), name


def test_the_teachers_vectors_need_no_unit_length() -> None:
    batch = batch_of_ids(QUERY_IDS, TARGET_IDS)
    longer = {name: 7 * vectors for name, vectors in batch.pair_data.items()}
    sides = [{"embedding": embedding_of(ids, 2)} for ids in (QUERY_IDS, TARGET_IDS)]
    found = [
        Distillation()(*sides, {}, each, FusionConfig()).loss.item()
        for each in (batch, dataclasses.replace(batch, pair_data=longer))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_rank_correlation_equals_scipys_definition() -> None:
    first, second = unit(4, 9, seed=0), unit(4, 9, seed=1)
    kept = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    found = rank_correlation(first, second, kept)
    for row in range(4):
        columns = kept[row].nonzero()[:, 0]
        ranks = torch.stack([x[row, columns].argsort().argsort().double() for x in (first, second)])
        assert found[row].item() == pytest.approx(torch.corrcoef(ranks)[0, 1].item())


def test_the_log_says_how_far_student_and_teacher_agree() -> None:
    batch = batch_of_ids([1, 2, 3], [4, 5, 6])
    sides = [{"embedding": teacher_vectors(ids)[:, None]} for ids in (batch.query_ids_B, batch.target_ids_B)]
    metrics = Distillation()(*sides, {}, batch, FusionConfig()).metrics
    assert {name: value.item() for name, value in metrics.items()} == {
        "teacher/rank_correlation": pytest.approx(1),
        "teacher/same_nearest": pytest.approx(1),
    }
