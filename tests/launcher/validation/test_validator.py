"""A validation leaves the training as it is, bit for bit, and its scores are those of the evaluation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from agff.checkpoint_folder import complete_steps
from agff.engine import start_process_group
from agff.grad_cache import random_state
from agff.trainer import StepReport, train
from launcher.convert_checkpoint import main as convert_main
from launcher.evaluate import main as evaluate_main
from launcher.run import training
from launcher.run.backbone_identity import backbone_of_run
from launcher.run.config import ResolvedRun, resolve
from launcher.run.config_file import read_recipe, write_run_config
from launcher.run.data import build_processor, open_data
from launcher.run.hardware import Hardware
from launcher.validation.history import open_history
from launcher.validation.sets import check_sets_together, open_sets
from launcher.validation.validator import Validator
from tests.launcher.runs import SMALL_RECIPE
from tests.ranks import run_ranks

NUM_STEPS = 2
CPU = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=False)
ZERO: dict[int, dict[str, Any]] = {
    2: {"stage": 2},
    # partitioned, and fetched ahead by the trace that DeepSpeed records: prefetch has its usual size
    3: {"stage": 3, "stage3_param_persistence_threshold": 0},
}
LORA = {"lora": {"rank": 2, "dropout": 0.2}}
VEIN = {"layers": 1, "visual_sources": {"queries": ["Shapes_i2t"], "targets": ["Shapes_t2i"]}}


@dataclass(frozen=True)
class Case:
    stage: int
    recipe: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


CASES = {
    "lora-zero3": Case(3, backbone=LORA),
    "lora-zero2": Case(2, {"keep_last": 1, "keep_best": "held_out/loss"}, LORA),
    "vein-zero3": Case(3, {"objective": "vein", "loss": VEIN}),
    "mm_gem-zero3": Case(3, {"objective": "mm_gem", "loss": {}, "prompts": {"num_fine": 0}}),
    "text_only-zero3": Case(3, backbone={**LORA, "text_only": True}, sources=("Shapes_text",)),
}
"""Dropout, random masks, a head that is released, a tower that the training never calls."""
SCORED = ("lora-zero3", "mm_gem-zero3", "text_only-zero3")
"""Cases whose scores are compared with those of the evaluation."""


def run_of(project: Path, folder: Path, case: Case) -> ResolvedRun:
    cache = project / ".cache/quickstart"
    recipe = {**SMALL_RECIPE, "num_steps": NUM_STEPS, "save_every": 1, "precision": "fp32", **case.recipe}
    recipe |= {"backbone": {"path": str(cache / "backbone"), **case.backbone}, "validate_every": 1}
    recipe |= {"batch": {"global_batch_size": 8, "chunk_size": 6, "first_pass_chunks": 2}}
    recipe["data"] = {"shards": str(cache / "shards"), "sub_batch_size": 4, "num_workers": 0}
    if case.sources:
        recipe["data"]["weights"] = dict.fromkeys(case.sources, 1.0)
    recipe["validation"] = {
        "mmeb_eval": str(cache / "data/mmeb_eval"),
        "mmvp": str(cache / "data/mmvp"),
        "shards": str(project / "held_out"),
        "sources": list(case.sources),
        "max_queries": 4,
    }
    path = folder / f"recipe-{dist.get_rank()}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    values = {"gradient_clipping": 1.0, "zero_optimization": ZERO[case.stage]}
    config = read_recipe(path, [("run_dir", str(folder))])
    return resolve(config, values, deepspeed_name="zero", world_size=2, hardware=CPU)


class Watched:
    """What a training leaves on this rank, in hashes: after each step, and what was said of it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.steps: list[tuple[str, ...]] = []
        self.marks: list[str] = []

    def observe(self, report: StepReport) -> None:
        optimizer = self._engine.deepspeed.optimizer.optimizer.state
        state = [value for values in optimizer.values() for value in values.values()]
        own = [own_part(parameter) for parameter in self._engine.model.parameters()]
        modes = [module.training for module in self._engine.model.modules()]
        found = (own, state, [report.loss], [random_state()[0]])
        hashes = [digest(tensors) for tensors in found]
        self.steps.append((*hashes, str(modes), *report.batch.addresses))


def own_part(parameter: Any) -> Tensor:
    """What this rank has of it; behind the end of a partitioned one there is whatever was in memory."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.data
    return part.reshape(-1)[: max(0, parameter.ds_numel - dist.get_rank() * part.numel())]


def digest(tensors: list[Any]) -> str:
    hashed = hashlib.sha256()
    for tensor in (tensor for tensor in tensors if isinstance(tensor, Tensor)):
        hashed.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def trained(project: Path, folder: Path, case: Case, *, validates: bool, stops: bool) -> dict[str, Any]:
    """A run of 2 steps. stops: rank 1 is asked to stop during the validation after the first one, and then
    no more; so that one is left to the next start, which comes at once."""
    folder.mkdir(exist_ok=True)
    dist.barrier()
    run, rank = run_of(project, folder, case), dist.get_rank()
    device = start_process_group(rank)
    data, processor = open_data(run.config), build_processor(run.config)
    engine = training._build_engine(run, processor=processor, device=device)
    torch.manual_seed(1 + rank)
    sets = open_sets(run.config, data)
    assert sets is not None
    history = open_history(run, sets, start_step=0)
    assert history is not None
    lengths = check_sets_together(run, sets, processor, hashes=False)
    watched, reports = Watched(engine), []
    asked = iter([False, False, True, True] if stops and rank == 1 else [])
    validator = Validator(
        run,
        engine,
        processor,
        history,
        lengths,
        report=lambda *found: reports.append(found),
        mark=watched.marks.append,
        should_stop=lambda: next(asked, False),
    )
    state = {"data_plan": data.description, "backbone_sha256": backbone_of_run(run, start_step=0)}
    if rank == 0:
        write_run_config(run)
    cuts, saved, gathers = [], [], []

    def after_step(step: int) -> None:
        saved.append(complete_steps(folder))
        before = engine.gathers.count, engine.gathers.num_bytes
        if validates:
            validator.after_step(step)
            cuts.append((validator.was_cut_short, history.has(step)))
            validator.before_steps(step)
        gathers.append((before, (engine.gathers.count, engine.gathers.num_bytes)))

    assert train(
        engine,
        run.config.loss,
        run.config.fusion,
        data.batches(run, processor, rank=rank, start_step=0),
        start_step=0,
        num_steps=NUM_STEPS,
        save_every=1,
        max_skipped_in_a_row=0,
        observe=watched.observe,
        save=lambda step: training._save(engine, run, state, history, step) if validates else None,
        after_step=after_step,
        should_stop=lambda: False,
        mark=lambda what: None,
    )
    engine.deepspeed.destroy()
    return {
        "steps": watched.steps,
        "gathers": gathers,
        "cuts": cuts,
        "saved": saved,
        "marks": watched.marks,
        "reports": [(step, scores, best) for step, scores, _, best in reports],
        "names": sets.names,
    }


def train_all(project: Path, runs: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, case in CASES.items():
        found[name] = trained(project, runs / name, case, validates=True, stops=name == "lora-zero3")
        if not case.sources:
            found[f"{name} alone"] = trained(
                project, runs / f"{name}-alone", case, validates=False, stops=False
            )
    return found


@pytest.fixture(scope="module")
def all_trained(project: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder of the runs, what each rank found)."""
    runs = tmp_path_factory.mktemp("runs")
    return runs, run_ranks(train_all, project, runs, world_size=2, timeout_s=500)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.sources])
def test_a_validation_changes_nothing_of_the_training(all_trained: Any, name: str) -> None:
    """Weights, moments, loss, random state, modes and order of the data after each step, on both ranks."""
    for found in all_trained[1]:
        assert found[name]["steps"] == found[f"{name} alone"]["steps"]
        assert len(found[name]["steps"]) == NUM_STEPS
        for before, after in found[name]["gathers"]:  # between two trainings they differ: DeepSpeed's order
            assert before == after, "those of a validation not counted"
            assert (before[0] > 0) == (CASES[name].stage == 3)
    draws = {tuple(found[name]["steps"][step][3] for found in all_trained[1]) for step in range(NUM_STEPS)}
    is_random = name != "mm_gem-zero3"
    assert (len(draws) == NUM_STEPS) == is_random, "the training draws random numbers"


@pytest.mark.parametrize("name", CASES)
def test_every_step_that_is_due_is_scored_by_all_its_names(all_trained: Any, name: str) -> None:
    first, second = (found[name] for found in all_trained[1])
    assert [step for step, _, _ in first["reports"]] == [1, 2]
    for _, scores, _ in first["reports"]:
        assert list(scores) == first["names"]
        assert all(0 <= score <= 100 for score in scores.values())
    assert [report[:2] for report in first["reports"]] == [report[:2] for report in second["reports"]]
    assert first["reports"][0][1] != first["reports"][1][1], "training moves"
    assert any("MMVP, chunk 1 of this rank" in mark for mark in second["marks"])


def test_the_best_checkpoint_is_kept_beside_the_newest(all_trained: Any) -> None:
    """keep_last is 1: when the second step is saved, the first one's is there for its score alone."""
    runs, found = all_trained
    case = found[0]["lora-zero2"]
    assert case["saved"] == [[1], [2, 1]]
    (_, first, best), (_, second, best_of_both) = case["reports"]
    assert best == 1
    assert best_of_both == 1 + (second["held_out/loss"] < first["held_out/loss"])
    assert complete_steps(runs / "lora-zero2") == sorted({2, best_of_both}, reverse=True)


def test_a_request_to_stop_leaves_the_validation_to_the_next_start(all_trained: Any) -> None:
    for found in all_trained[1]:
        assert found["lora-zero3"]["cuts"] == [(True, False), (False, True)]
        assert found["lora-zero2"]["cuts"] == [(False, True), (False, True)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SCORED)
def test_scores_are_those_of_the_evaluation_of_the_release(
    all_trained: Any, project: Path, tmp_path: Path, name: str
) -> None:
    runs, found = all_trained
    release, sets = tmp_path / "release", project / ".cache/quickstart/data"
    assert convert_main([str(runs / name), str(release)]) == 0
    options = ["--mmeb_eval", str(sets / "mmeb_eval"), "--mmvp", str(sets / "mmvp"), "--max_queries", "4"]
    assert evaluate_main([str(release), *options]) == 0
    evaluated = json.loads((release / "scores.json").read_text())
    scores = json.loads((runs / name / "validation.json").read_text())["validations"][-1]["scores"]
    assert scores == found[0][name]["reports"][-1][1]
    expected = {f"mmeb/{each['name']}": each["score"] for each in evaluated["mmeb"]["sets"]}
    expected |= {
        f"mmvp/{each['name'].replace(' ', '_')}": each["score"] for each in evaluated["mmvp"]["patterns"]
    }
    expected |= {"mmvp": evaluated["mmvp"]["average"]["score"], "mmeb": evaluated["mmeb"]["overall"]["score"]}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert len(expected) == 3 + 3 + 2
