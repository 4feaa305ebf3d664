"""What any objective can rely on, and how little it takes to add one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from agff.batch import Batch, Encoded, ModelInputs
from agff.collectives import all_gather_rows, rank, weighted_mean_over_all_rows, world_size
from agff.errors import ConfigError
from agff.losses import info_nce
from agff.objectives import OBJECTIVES
from agff.objectives.contrastive import Contrastive
from agff.objectives.objective import Head, Objective, ObjectiveResult
from agff.similarity import FusionConfig
from agff.step import train_step
from launcher.run.config import RunConfig, run_config_of
from launcher.run.config_file import read_recipe
from launcher.run.typed_values import setting_names
from tests.agff.test_step import PlainEngine
from tests.agff.tiny import batch_of, global_rows, tiny_model
from tests.ranks import run_ranks

RECIPE = Path("launcher/recipes/quickstart.yaml")


@dataclass(frozen=True, kw_only=True)
class Cosine(Objective):
    """InfoNCE of the global vectors."""

    softness: float = 0.5

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        similarity_BC = query["embedding"][:, 0] @ all_gather_rows(target["embedding"][:, 0]).T
        own = torch.arange(batch.num_pairs) + rank() * batch.num_pairs
        loss_B = info_nce(similarity_BC, own, temperature=self.softness)
        return ObjectiveResult(loss=loss_B.mean(), metrics={}, pair_loss_B=loss_B.detach())


@pytest.fixture
def with_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "cosine", Cosine)


@pytest.mark.usefixtures("with_cosine")
def test_a_new_objective_is_a_class_a_row_and_a_recipe(tmp_path: Path) -> None:
    text = RECIPE.read_text()
    start, stop = text.index("loss:"), text.index("optimizer:")
    recipe = tmp_path / "cosine.yaml"
    recipe.write_text(f"{text[:start]}objective: cosine\nloss:\n  softness: 0.3\n{text[stop:]}")
    assert read_recipe(recipe).loss == Cosine(softness=0.3)
    config = read_recipe(recipe, [("loss.softness", "0.4")])
    assert config.loss == Cosine(softness=0.4)
    model, rows = tiny_model(0), global_rows(8, 0, rows_without_image=range(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    class Engine(PlainEngine):
        def step(self) -> bool:
            optimizer.step()
            optimizer.zero_grad()
            return True

    engine = Engine(model)
    losses = [
        train_step(engine, config.loss, config.fusion, batch_of(rows, 3, 0)).loss.item() for _ in range(8)
    ]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.usefixtures("with_cosine")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("objective", "cosinus")], "--objective: expected one of contrastive, .*cosine, found cosinus"),
        (
            [("loss.softness", "1")],
            "--loss.softness: unknown to this objective; it is a setting of objective cosine",
        ),
        (
            [("objective", "cosine")],
            r"quickstart.yaml:\d+: loss.temperature: unknown to this objective; .* contrastive",
        ),
    ],
)
def test_objectives_and_their_settings_are_named(overrides: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(RECIPE, overrides)


def test_a_loss_of_another_objective_is_refused() -> None:
    values: dict[str, Any] = vars(read_recipe(RECIPE)) | {"loss": Cosine()}
    with pytest.raises(ConfigError, match="objective=contrastive does not fit loss, which is Cosine"):
        RunConfig(**values)


@pytest.mark.usefixtures("with_cosine")
@pytest.mark.parametrize("name", [*OBJECTIVES, "cosine"])
def test_the_settings_of_every_objective_are_those_of_the_section_loss(name: str) -> None:
    names = setting_names(run_config_of(name))
    found = {setting for setting in names if setting.startswith("loss.") and setting.count(".") == 1}
    assert found == {f"loss.{field.name}" for field in dataclasses.fields(OBJECTIVES[name])}
    assert found


# ---------------------------------------------------------------- the head


class WrongRows(Head):
    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        return {"tokens": embedding_BMD[:-1]}


class NotFinite(Head):
    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        return {"fine": embedding_BMD[:, 0, 0], "reconstruction": embedding_BMD[:, 0, 0] / 0}


def test_an_output_with_another_number_of_rows_is_named() -> None:
    batch = batch_of(global_rows(4, 0, rows_without_image=range(0)), 4, 0)
    with pytest.raises(ValueError, match=r"output 'tokens' of WrongRows has shape \(3, 1, 16\).* the 4 rows"):
        train_step(PlainEngine(tiny_model(0, head=WrongRows())), Contrastive(), FusionConfig(), batch)


def test_outputs_that_are_not_finite_are_named() -> None:
    class Skips(PlainEngine):
        def step(self) -> bool:
            return False

    batch = batch_of(global_rows(4, 0, rows_without_image=range(0)), 4, 0)
    result = train_step(Skips(tiny_model(0, head=NotFinite())), Contrastive(), FusionConfig(), batch)
    assert result.not_finite == ("reconstruction",)


# ---------------------------------------------------------------- means over the rows of all ranks

WEIGHTS = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.0, 0.0])
"""On three ranks of two rows, the last has none that counts."""


def share_and_gradient() -> tuple[float, list[float], float]:
    local = len(WEIGHTS) // world_size()
    own = slice(rank() * local, (rank() + 1) * local)
    value = torch.tensor([1.0, math.nan, 3.0, -4.0, math.inf, 9.0])[own].requires_grad_()
    share = weighted_mean_over_all_rows(value, WEIGHTS[own])
    (gradient,) = torch.autograd.grad(share, value)
    nothing = weighted_mean_over_all_rows(value, torch.zeros(local))
    total = share.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / world_size(), (gradient / world_size()).tolist(), nothing.item()


def test_the_ranks_mean_is_the_weighted_mean_over_all_rows() -> None:
    expected = (2 * 1 + 1 * 3 - 0.5 * 4) / 3.5
    for world in (1, 3):
        results = [share_and_gradient()] if world == 1 else run_ranks(share_and_gradient, world_size=world)
        for mean, _, nothing in results:
            assert mean == pytest.approx(expected)
            assert nothing == 0
        gradient = [value for _, own, _ in results for value in own]
        assert gradient == pytest.approx((WEIGHTS / 3.5).tolist())
