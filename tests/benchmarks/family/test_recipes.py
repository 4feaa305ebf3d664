"""Every recipe of the family passes a dry run on small stand-ins, with the very settings that `make family`
gives it."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agff.embedder import Embedder
from agff.release_writer import save_release
from launcher.command_line import RECIPES, parse_train_arguments
from launcher.prepare import main as prepare_main
from launcher.quickstart.eval_sets import write_eval_sets
from launcher.quickstart.family_sets import write_family_sets
from launcher.quickstart.mmvp_pairs import write_mmvp_set
from launcher.quickstart.sheet_sets import write_sheet_sets
from launcher.quickstart.train_sets import write_train_sets
from launcher.run.data import build_processor
from launcher.run.model import untrained_model
from launcher.train import main as train_main
from tests.benchmarks.family.__main__ import NUM_PAIRS, batch_size_of
from tests.benchmarks.family.methods import METHODS, QUICKSTART, Method
from tests.benchmarks.family.report import ROOT
from tests.benchmarks.family.runner import run_command, run_tasks
from tests.benchmarks.family.table import table_of
from tests.benchmarks.family.tasks import SHARDS, TEACHER, Comparison, Task
from tests.drawings import tiny_backbone
from tests.launcher.quickstart.test_sets import make_drawings
from tests.stand_in_vectors import write_stand_in

FOLDER = Path(".cache/family")


def family() -> Comparison:
    return Comparison(methods=METHODS, num_pairs=NUM_PAIRS, folder=FOLDER, batch_size_of=batch_size_of)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder whose quickstart is coloured squares and the tiniest backbone, with shards of them."""
    folder = tmp_path_factory.mktemp("family")
    write_train_sets(folder / QUICKSTART / "data/mmeb", make_drawings(), seed=0)
    write_family_sets(folder / QUICKSTART / "family", make_drawings(), seed=0)
    tiny_backbone(folder / QUICKSTART / "backbone")
    for name, (option, source, *rest) in SHARDS.items():
        arguments = [option, str(folder / source), *rest, "--out", str(folder / FOLDER / "shards" / name)]
        assert prepare_main(arguments) == 0
    texts = folder / FOLDER / "shards/texts"
    write_stand_in(folder / family().vectors("texts", "teacher"), texts)
    return folder


def release_untrained(arguments: list[str], out: Path) -> None:
    """A release of the model that these arguments begin with."""
    config = parse_train_arguments(arguments).config
    model = untrained_model(config, dtype=torch.float32, attention="sdpa")
    if model.head is not None and not model.head.is_released:
        model.head = None
    torch.nn.init.normal_(model.prompted_embedding.vectors, std=0.05)
    objective = config.loss if model.head is not None else None
    save_release(
        Embedder(model, build_processor(config), config.fusion, texts=config.texts, objective=objective),
        out,
        origin={},
    )


@pytest.mark.parametrize(
    "method",
    METHODS,
    ids=lambda method: method.name,
)
def test_stages_pass_a_dry_run(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], method: Method
) -> None:
    monkeypatch.chdir(small)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    compared = Comparison(methods=(method,), num_pairs=NUM_PAIRS, folder=FOLDER, batch_size_of=batch_size_of)
    trainings = [task for task in compared.tasks() if task.name.startswith("train ")]
    assert len(trainings) == len(method.stages)
    for number, task in enumerate(trainings):
        arguments = [*task.command[2:], "--data.sub_batch_size", "8"]  # the stand-in has few questions
        assert train_main([*arguments, "--dry-run"]) == 0, capfd.readouterr().err
        output = capfd.readouterr().out
        steps = compared.steps(method.stages[number])
        assert (
            f"steps                {steps:,} = {steps * batch_size_of(method.stages[number].recipe):,}"
            in output
        )
        assert ("begins with" in output) == (number > 0)
        if number + 1 < len(trainings):
            release_untrained(arguments, compared.release(method, number))


def test_every_quickstart_recipe_takes_part() -> None:
    used = {stage.recipe for method in METHODS for stage in method.stages}
    assert {path.stem for path in RECIPES.glob("quickstart*.yaml")} <= used


def test_every_method_sees_equally_many_pairs() -> None:
    for method in METHODS:
        pairs = sum(family().steps(stage) * batch_size_of(stage.recipe) for stage in method.stages)
        assert pairs == NUM_PAIRS, method.name


SMALL = {"data.sub_batch_size": "8", "optimizer.warmup_steps": "1"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_comparison_of_all_that_have_recipes_runs_in_small(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the real commands, but for the one that fetches; its teacher is a release of ours."""
    monkeypatch.chdir(small)
    for name in ("launcher", "ds_configs"):
        Path(name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    write_eval_sets(QUICKSTART / "data/mmeb_eval", make_drawings(), seed=0)
    write_mmvp_set(QUICKSTART / "data/mmvp", make_drawings())
    write_sheet_sets(QUICKSTART / "data/captions", make_drawings(), seed=0)
    pairs = ["--recipe", "quickstart", "--backbone.path", str(QUICKSTART / "backbone")]
    release_untrained(pairs, TEACHER)
    compared = Comparison(
        methods=tuple(
            replace(
                method,
                stages=tuple(replace(stage, settings={**stage.settings, **SMALL}) for stage in method.stages),
            )
            for method in METHODS
        ),
        num_pairs=640,
        folder=Path("out"),
        batch_size_of=batch_size_of,
    )

    def run(task: Task, log: Path) -> int:
        return 0 if task.name == "data" else run_command(task, log)

    try:
        seconds = run_tasks(compared.tasks(), compared.folder, code="c", run=run)
    except RuntimeError as error:
        pytest.fail(f"{error}\n{(compared.folder / 'log.txt').read_text()[-3000:]}")
    table = table_of(compared, seconds)
    assert [entry.title for entry in table.entries] == [method.title for method in METHODS]
    assert all(0 <= score <= 100 for entry in table.entries for score, _ in entry.scores.values())
    facts = {method.name: entry.facts for method, entry in zip(METHODS, table.entries, strict=True)}
    assert all(facts.values())
