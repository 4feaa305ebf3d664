"""Whole runs, started as a person starts them: resume, release, wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agff.files import partial_path
from agff.objectives.objective import Objective
from agff.objectives.vein import Vein
from agff.zero_weights import ZeroWeights
from launcher.command_line import RECIPES, parse_train_arguments
from launcher.convert_checkpoint import main as convert_main
from launcher.run import hardware
from launcher.run.stop_request import EXIT_CODE
from launcher.train import main as train_main
from tests.consolidated import consolidated_weights
from tests.data_pipeline.test_remote import FaultyServer
from tests.launcher.runs import run_command, signal_when_saved, train_command
from tests.stand_in_vectors import write_stand_in

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=[3, 1, 2], ids=lambda stage: f"zero{stage}")
def trained(
    request: pytest.FixtureRequest, train_once: Callable[[int], tuple[Path, str]]
) -> tuple[int, Path, str]:
    """(ZeRO stage, run folder, output)."""
    return request.param, *train_once(request.param)


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    """Every value in every file of a checkpoint, flattened; our own files of this very test."""

    def flatten(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v for name, item in value.items() for k, v in flatten(f"{prefix}/{name}", item).items()
            }
        if isinstance(value, list | tuple):
            return {
                k: v
                for index, item in enumerate(value)
                for k, v in flatten(f"{prefix}/{index}", item).items()
            }
        return {prefix: value}

    found: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.pt")):
        found |= flatten(path.name, torch.load(path, weights_only=False, map_location="cpu"))
    return found


def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(
    trained: tuple[int, Path, str], project: Path
) -> None:
    stage, run, _ = trained
    unbroken = project / f"unbroken-zero{stage}"
    shutil.copytree(run, unbroken)
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-000002", "step-000004"]
    # as a kill in mid-save leaves it
    (checkpoints / "step-000004").rename(checkpoints / "step-000004.partial")
    result = run_command(train_command(stage), project)
    assert result.returncode == 0, result.stdout
    assert "2/4" in result.stdout, "it must continue at step 2"
    expected, found = (
        tensors_of(unbroken / "checkpoints/step-000004"),
        tensors_of(checkpoints / "step-000004"),
    )
    assert expected.keys() == found.keys()
    compared = 0
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, found[name]), name
            compared += value.numel()
        elif isinstance(value, int | float | str):
            assert value == found[name], name
    assert compared > 3 * 100_000, "weights and both moments of Adam"
    first, last = (consolidated_weights(unbroken, step=step) for step in (2, 4))
    assert not torch.equal(
        first["backbone.visual.merger.mlp.0.weight"], last["backbone.visual.merger.mlp.0.weight"]
    )


def pairs_and_losses(run: Path, world_size: int) -> tuple[dict[int, list[str]], dict[int, float]]:
    """By step: the addresses of the global batch in its order, and the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pairs: dict[int, list[str]] = {}
    for rank in range(world_size):
        for line in (run / f"samples/{rank:05d}-of-{world_size:05d}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            rows = pairs.setdefault(entry["step"], [""] * 8)
            rows[rank::world_size] = entry["addresses"]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return pairs, {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.fixture(scope="module")
def logged_run(project: Path) -> tuple[str, Path]:
    """(command of a 6-step run on 2 ranks that writes down its pairs, its folder)."""
    command = f"{train_command(3)} --log_samples true --num_steps 6 --precision fp32"
    result = run_command(f"{command} --run_dir runs/ranks", project)
    assert result.returncode == 0, result.stdout
    return command, project / "runs/ranks"


def test_a_run_continues_on_other_numbers_of_ranks_with_the_same_global_batches(
    project: Path, logged_run: tuple[str, Path]
) -> None:
    command, run = logged_run
    expected, losses = pairs_and_losses(run, 2)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert all(len(pairs) == 8 for pairs in expected.values())
    for world_size in (1, 4):
        copy = project / f"runs/ranks{world_size}"
        shutil.copytree(run, copy)
        for last in (4, 6):
            shutil.rmtree(copy / f"checkpoints/step-{last:06d}")
        result = run_command(f"{command} --run_dir runs/ranks{world_size} --cpu_ranks {world_size}", project)
        assert result.returncode == 0, result.stdout
        assert f"resharding the checkpoint for {world_size} ranks" in result.stdout
        found, continued = pairs_and_losses(copy, world_size)
        assert found == {step: expected[step] for step in (3, 4, 5, 6)}
        assert [continued[step] for step in range(1, 7)] == pytest.approx(
            [losses[s] for s in range(1, 7)], abs=1e-5
        )
        assert not list((copy / "checkpoints").glob("*universal*"))


@pytest.mark.slow
def test_chunks_by_tokens_and_shards_from_a_web_server_are_the_same_run(
    project: Path, logged_run: tuple[str, Path]
) -> None:
    command, run = logged_run
    expected, losses = pairs_and_losses(run, 2)
    server = FaultyServer(project / ".cache/quickstart/shards")
    try:
        manifest = json.loads((project / ".cache/quickstart/shards/manifest.json").read_text())
        first = manifest["sources"]["Shapes_VQA"]["shards"][0]["name"]
        server.faults[f"Shapes_VQA/{first}"] = ["truncate", "500"]
        changed = f"--batch.chunk_size null --batch.max_tokens_per_chunk 120 --data.shards {server.url}"
        cache = f"--data.cache.dir {project}/shard-cache"
        result = run_command(f"{command} {changed} {cache} --run_dir runs/tokens", project)
    finally:
        server.close()
    assert result.returncode == 0, result.stdout
    assert "chunks of 120 tokens, local 4, x 2 ranks = global 8" in result.stdout
    assert f"{server.url}, through a cache of at most 100 GiB in {project}/shard-cache" in result.stdout
    found, continued = pairs_and_losses(project / "runs/tokens", 2)
    assert found == expected
    assert [continued[step] for step in range(1, 7)] == pytest.approx(
        [losses[s] for s in range(1, 7)], abs=1e-5
    )
    assert {count for path, count in server.requests.items() if path.endswith(".tar")} <= {1, 3}, (
        "both ranks share the cache"
    )


def test_another_order_of_the_data_is_refused_and_accepted_when_told(
    train_once: Callable[[int], tuple[Path, str]], project: Path
) -> None:
    shutil.copytree(train_once(3)[0], project / "runs/order")
    command = f"{train_command(3)} --run_dir runs/order"
    shutil.rmtree(project / "runs/order/checkpoints/step-000004")
    changed = f"{command} --seed 1 --data.caps 10"
    says = (
        "error: runs/order: the order of the data changed since step 2: seed: 0 -> 1; source Shapes_VQA: "
        "samples 96 -> 10"
    )
    for attempt in (f"{changed} --dry-run", changed):
        result = run_command(attempt, project)
        assert result.returncode == 2, result.stdout
        assert result.stdout.count(says) == 1
    assert "continue in the new order with --data.accept_changes true" in result.stdout
    result = run_command(f"{changed} --data.accept_changes true", project)
    assert result.returncode == 0, result.stdout
    assert "4/4" in result.stdout


LAST = "checkpoints/step-000008"


@pytest.fixture(scope="module")
def whole_run(project: Path) -> tuple[str, dict[str, Any]]:
    """(command of an 8-step run that saves each step, what an unbroken one has at its end)."""
    command = f"{train_command(2)} --num_steps 8 --save_every 1"
    result = run_command(f"{command} --run_dir runs/whole", project)
    assert result.returncode == 0, result.stdout
    return command, tensors_of(project / "runs/whole" / LAST)


def assert_same_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    compared = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert len(compared) > 20
    assert [name for name in compared if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("victims", ["all", "worker"])
def test_a_killed_run_continues_to_the_same_weights(
    project: Path, whole_run: tuple[str, dict[str, Any]], victims: str
) -> None:
    command, expected = whole_run
    command = f"{command} --run_dir runs/killed-{victims}"
    run = project / f"runs/killed-{victims}"
    assert signal_when_saved(command, project, run, victims=victims) != 0
    assert not (run / LAST).exists(), "it was killed in time"
    result = run_command(command, project)
    assert result.returncode == 0, result.stdout
    assert_same_tensors(tensors_of(run / LAST), expected)


@pytest.mark.parametrize(
    ("victims", "number"),
    [pytest.param("ranks", signal.SIGUSR1, marks=pytest.mark.slow), ("one rank", signal.SIGTERM)],
)
def test_a_run_asked_to_stop_saves_and_continues_to_the_same_weights(
    project: Path, whole_run: tuple[str, dict[str, Any]], victims: str, number: signal.Signals
) -> None:
    command, expected = whole_run
    run = project / f"runs/stopped-{number.name}"
    command = f"{command.replace('save_every 1', 'save_every 2')} --run_dir {run.relative_to(project)}"
    assert signal_when_saved(command, project, run, victims=victims, number=number) == EXIT_CODE
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-??????"))
    assert not (run / LAST).exists(), "it stopped in time"
    assert saved[-1] > "step-000004" or len(saved) >= 2
    result = run_command(command, project)
    assert result.returncode == 0, result.stdout
    assert_same_tensors(tensors_of(run / LAST), expected)


def test_a_damaged_newest_checkpoint_falls_back_loudly_and_old_ones_are_removed(
    project: Path, whole_run: tuple[str, dict[str, Any]]
) -> None:
    command, expected = whole_run
    run = project / "runs/damaged"
    shutil.copytree(project / "runs/whole", run)
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-000006", "step-000007", "step-000008"], "keep_last is 3"
    shutil.rmtree(run / LAST)
    masters = ZeroWeights(run / "checkpoints/step-000007").pieces[0]
    damaged = masters.path
    content = bytearray(damaged.read_bytes())
    content[masters.start] ^= 1  # where the conversion reads too; of the rest it looks at the size
    damaged.write_bytes(content)
    result = run_command(f"python launcher/convert_checkpoint.py {run} releases/damaged", project)
    assert result.returncode == 2
    assert f"{damaged}: damaged: Bad CRC-32" in result.stdout
    assert f"{run}: the newest checkpoint is damaged (step 7); convert an older one with --step 6, or" in (
        result.stdout
    )
    assert not (project / "releases/damaged").exists()
    result = run_command(f"{command} --run_dir runs/damaged --keep_last 1 --keep_every 7", project)
    assert result.returncode == 0, result.stdout
    assert "DAMAGED CHECKPOINT, going back to the one before it" in result.stdout
    assert str(damaged.relative_to(project)) in result.stdout
    assert "6/8" in result.stdout
    assert_same_tensors(tensors_of(run / LAST), expected)
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-000007", "step-000007.damaged", "step-000008"], (
        "the newest, and the multiple of keep_every"
    )


def test_the_table_explains_the_batch_and_the_log_is_written(trained: tuple[int, Path, str]) -> None:
    stage, run, output = trained
    assert f"2, ZeRO stage {stage}" in output
    assert "local 4 x 2 ranks = global 8; up to 6 chunks of 2 items, two passes (GradCache)" in output
    assert "negatives per query  7, less those" in output
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/similarity/positive",
        "train/similarity/hardest_negative",
        "train/batch_accuracy",
        "train/rows_without_negative",
        "train/negatives_per_row",
        "train/ega/mean_weight",
        *(f"train/pattern_share/{p}" for p in ("global_global", "fine_global", "global_fine", "fine_fine")),
        "train/gradient_norm",
        "train/learning_rate",
        "speed/samples_per_s",
        "speed/tokens_per_s",
        "speed/patches_per_s",
        "speed/tflops_per_s",
        "speed/executed_per_useful",
        "speed/padding_percent",
        "speed/rank_imbalance",
        "speed/data_wait_percent",
        "speed/peak_memory_gib",
        "data/skipped_samples",
    }
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    value = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert 1 < value["speed/executed_per_useful"] < 10
    assert 1 <= value["speed/rank_imbalance"] < 2
    assert 0 <= value["speed/padding_percent"] < 100
    assert value["speed/patches_per_s"] > value["speed/samples_per_s"] > 0
    assert value["speed/peak_memory_gib"] > 0.1
    assert "x useful" in output, "where no peak is known"
    shares = [events.Scalars(f"train/pattern_share/{p}")[0].value for p in ("global_global", "fine_global")]
    assert 0 < sum(shares) < 1


def test_parameter_gathers_of_zero3_are_measured(trained: tuple[int, Path, str]) -> None:
    stage, _, output = trained
    found = re.findall(r"^parameter gathers in step 2: (\d+) all-gathers, [\d.]+ MiB$", output, re.MULTILINE)
    assert len(found) == (stage == 3), output


def test_a_finished_run_says_so(train_once: Callable[[int], tuple[Path, str]], project: Path) -> None:
    stage, (run, _) = 3, train_once(3)
    result = run_command(train_command(stage), project)
    assert result.returncode == 0, result.stdout
    assert (
        f"runs/{run.name}: all 4 steps are done; evaluate or convert it, or choose another --run_dir"
        in result.stdout
    )


def test_release_loads_without_deepspeed(
    trained: tuple[int, Path, str], project: Path, tmp_path: Path
) -> None:
    _, run, _ = trained
    assert convert_main([str(run), str(tmp_path / "release")]) == 0, "from another folder than the run's"
    script = f"""
import sys
sys.modules["deepspeed"] = None
import agff
from PIL import Image
model = agff.load({str(tmp_path / "release")!r})
image = Image.new("RGB", (56, 56), "red")
a = model.encode(["one red circle top", image, {{"text": "what?", "image": image}}])
assert a.shape == (3, 5, 32), a.shape
print("similarity", model.similarity(a, a).diagonal().tolist())
from transformers import AutoModel, AutoTokenizer
AutoModel.from_pretrained({str(tmp_path / "release/backbone")!r})
"""
    result = run_command(f"python - <<'EOF'\n{script}\nEOF", project)
    assert result.returncode == 0, result.stdout
    assert "similarity [" in result.stdout
    assert convert_main([str(run), str(tmp_path / "release")]) == 2, "an existing release is not overwritten"


@pytest.mark.parametrize(
    ("stage", "lora"), [pytest.param(2, "", marks=pytest.mark.slow), (3, "--backbone.lora.rank 2")]
)
def test_bf16_weights_train_and_resume(project: Path, stage: int, lora: str) -> None:
    """What a GPU does by default."""
    command = f"{train_command(stage)} --precision bf16 {lora} --run_dir runs/bf16-{stage}"
    result = run_command(command, project)
    assert result.returncode == 0, result.stdout
    run = project / f"runs/bf16-{stage}/checkpoints"
    assert {value.dtype for value in consolidated_weights(run.parent, step=4).values()} == {torch.float32}, (
        "the masters"
    )
    unbroken = tensors_of(run / "step-000004")
    shutil.rmtree(run / "step-000004")
    result = run_command(command, project)
    assert "2/4" in result.stdout
    assert_same_tensors(tensors_of(run / "step-000004"), unbroken)


def test_lora_run_resumes_and_is_released(project: Path, lora_run: tuple[str, Path], tmp_path: Path) -> None:
    command, _ = lora_run
    expected = tensors_of(project / "runs/lora/checkpoints/step-000004")
    shutil.rmtree(project / "runs/lora/checkpoints/step-000004")
    result = run_command(
        f"{command} && python launcher/convert_checkpoint.py runs/lora {tmp_path}/release", project
    )
    assert result.returncode == 0, result.stdout
    found = tensors_of(project / "runs/lora/checkpoints/step-000004")
    tensors = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(torch.equal(expected[name], found[name]) for name in tensors)
    assert "every weight read back equal" in result.stdout
    weights = consolidated_weights(project / "runs/lora", step=4)
    adapters = [weight for name, weight in weights.items() if "lora_B" in name]
    assert adapters
    assert all(weight.abs().max() > 0 for weight in adapters), "an adapter that never moved was saved"


# ------------------------------------------------------------------ wrong input, before the first step


@pytest.fixture
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The project's folder as working folder, with shards of its own to damage."""
    shutil.copytree(project / ".cache", tmp_path / ".cache")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


SMALL = [
    *("--num_steps", "4", "--optimizer.warmup_steps", "1", "--data.weights", "null"),
    *("--batch.global_batch_size", "8", "--batch.chunk_size", "2", "--data.sub_batch_size", "4"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch.global_batch_size", "9"], "global_batch_size=9 is not a multiple of 2 ranks; use 8 or 10"),
        (
            ["--data.shards", "nowhere"],
            "nowhere: no shards here (manifest.json is missing); make them with launcher/prepare.py",
        ),
        (["--backbone.path", "nowhere"], "nowhere: no such folder; backbone.path is a local folder"),
        (["--data.weights", "{Shapes: 1.0}"], "data.weights names Shapes, absent from the shards"),
        (
            ["--data.sub_batch_size", "8", "--data.weights", "{Shapes_t2i: -1}"],
            "data.weights.Shapes_t2i=-1.0 must be > 0",
        ),
        (["--run_dir", ".cache"], ".cache exists and holds no run"),
        (["--loss.temperature", "0"], "loss.temperature=0.0 must be > 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    in_project: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(in_project.rglob("*"))
    assert train_main([*SMALL, *arguments]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(in_project.rglob("*")) == before, "nothing may be written"


def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_the_cpu(
    in_project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "NVIDIA_DRIVER", in_project / "driver")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (in_project / "driver/0000:01:00.0").mkdir(parents=True)
    assert train_main(SMALL) == 2
    assert re.search(
        r": the driver knows 1 NVIDIA GPUs, torch .* can use none; .*DS_ACCELERATOR=cpu",
        capfd.readouterr().err,
    )
    for meant in ({"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}):
        assert hardware.num_unusable_gpus(meant) == 0
    assert train_main([*SMALL, "--dry-run"]) == 0


def test_dry_run_prints_the_table_and_writes_nothing(
    in_project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = in_project / "runs/mmeb_qwen2vl_2b-zero2"
    run.mkdir(parents=True)
    # what a start leaves that was killed at once
    for path in (run / ".lock", run / "deepspeed.json", partial_path(run / "config.yaml")):
        path.touch()
    before = sorted(in_project.rglob("*"))
    recipe = ["--recipe", "mmeb_qwen2vl_2b", "--backbone.path", ".cache/quickstart/backbone"]
    shards = ["--data.shards", ".cache/quickstart/shards", "--data.sub_batch_size", "8"]
    assert train_main([*recipe, *shards, "--backbone.attention", "flash_attention_2", "--dry-run"]) == 2
    assert "backbone.attention=flash_attention_2, but" in capfd.readouterr().err
    assert train_main([*recipe, *shards, "--loss.nested_dims", "[16, 9999]", "--dry-run"]) == 2
    assert "loss.nested_dims=[16, 9999] must be <= " in capfd.readouterr().err
    assert train_main([*recipe, *shards, "--dry-run"]) == 0
    output = capfd.readouterr().out
    assert "LoRA rank 16" in output
    assert "local 512 x 2 ranks = global 1024; chunks of what fits, found before the first step" in output
    assert sorted(in_project.rglob("*")) == before


def stand_in_vectors(project: Path) -> list[str]:
    """Options of vectors of the project's shards, made of nothing."""
    write_stand_in(project / "vectors", project / ".cache/quickstart/shards")
    return ["--data.vectors", "vectors"]


def fitting_settings(loss: Objective) -> list[str]:
    """Settings of an objective that name sources or layers, for the small stand-ins."""
    if not isinstance(loss, Vein):
        return []
    return ["--loss.visual_sources", "{queries: [Shapes_i2t], targets: [Shapes_t2i]}", "--loss.layers", "1"]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_dry_run_of_every_recipe_under_the_zero_stage_it_names(
    in_project: Path, capfd: pytest.CaptureFixture[str], recipe: str
) -> None:
    """LoRA under ZeRO-2, full tuning under ZeRO-3."""
    data = [
        "--data.shards",
        ".cache/quickstart/shards",
        "--data.weights",
        "null",
        "--data.sub_batch_size",
        "8",
    ]
    loss = parse_train_arguments(["--recipe", recipe]).config.loss
    data += stand_in_vectors(in_project) if loss.needs_vectors else []
    backbone = ["--backbone.path", ".cache/quickstart/backbone", "--prompts.start_from", "null"]
    assert train_main(["--recipe", recipe, *backbone, *data, *fitting_settings(loss), "--dry-run"]) == 0
    output = capfd.readouterr().out
    stage = 2 if "LoRA rank" in output else 3
    assert f"ZeRO stage {stage}" in output
    assert f"runs/{recipe}-zero{stage}" in output
    measured = "logged after the second step" if stage == 3 else "1 per step: the updated parameters"
    assert re.search(rf"parameter gathers +{measured}", output)


def test_a_run_folder_of_another_configuration(
    train_once: Callable[[int], tuple[Path, str]], project: Path
) -> None:
    stage, (run, _) = 3, train_once(3)
    result = run_command(f"{train_command(stage)} --fusion.beta 0.1", project)
    assert result.returncode == 2, result.stdout
    assert f"runs/{run.name} belongs to another configuration: fusion.beta: 0.05 -> 0.1" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("remove", "shard is missing; restore it"),
        ("flip", "SHA-256 of the shard is"),
    ],
)
def test_damaged_shards_stop_all_ranks_before_the_first_step(
    project: Path, tmp_path: Path, damage: str, message: str
) -> None:
    copy = tmp_path / "project"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("runs"))
    shard = copy / ".cache/quickstart/shards/Shapes_i2t/Shapes_i2t-00000.tar"
    if damage == "remove":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[-20_000] ^= 1
        shard.write_bytes(content)
    result = run_command(train_command(3), copy)
    assert result.returncode == 2, result.stdout
    assert message in result.stdout
    assert "Traceback" not in result.stdout
    assert not (copy / "runs").exists()


def test_a_bad_sample_is_skipped_and_logged_and_too_many_stop_all_ranks(
    project: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "project"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("runs"))
    shards = copy / ".cache/quickstart/shards"
    # every image of one source becomes undecodable
    for shard in sorted((shards / "Shapes_i2t").glob("*.tar")):
        shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"XXXX"))
    rest = (
        "--data.check_hashes false --data.weights '{Shapes_i2t: 1, Shapes_text: 3}' --data.max_bad_in_a_row 3"
    )
    result = run_command(f"{train_command(3)} {rest}", copy)
    assert result.returncode == 2, result.stdout
    assert "4 bad samples in a row for row" in result.stdout
    assert "Shapes_i2t-0000" in result.stdout
    assert result.stdout.count("error: ") == 1
    first = sorted((shards / "Shapes_i2t").glob("*.tar"))[0]
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["sources"]["Shapes_i2t"]["shards"][0]["name"] == first.name


def test_nothing_was_compiled(train_once: Callable[[int], tuple[Path, str]]) -> None:
    """DeepSpeed builds operators into this folder when it needs one: minutes, and a lock that a kill leaves
    behind."""
    train_once(3)
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert not [path for path in folder.rglob("*") if path.is_file()]


LAUNCHERS = {
    "mpirun": ["mpirun --oversubscribe -n 2 python {train}"],
    "torchrun": ["torchrun --nproc-per-node 2 --master-port 29523 {train}"],
    "deepspeed --hostfile on each node": [
        f"deepspeed --hostfile hosts --no_ssh --node_rank {node} --master_addr 127.0.0.1 --master_port 29527 "
        f"{{train}}"
        for node in (0, 1)
    ],
}


@pytest.mark.parametrize("commands", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_every_launcher_trains_the_same(
    commands: list[str], project: Path, train_once: Callable[[int], tuple[Path, str]]
) -> None:
    unbroken, _ = train_once(2)
    run = project / "runs" / f"launched-{commands[0].split()[0]}"
    (project / "hosts").write_text("first slots=1\nsecond slots=1\n")
    train = f"launcher/train.py --deepspeed ds_configs/zero2.json --run_dir {run}"
    *others, last = [command.format(train=train) for command in commands]
    beside = "".join(f"{other} & other=$!; " for other in others)
    result = run_command(f"{beside}{last}{' && wait $other' if others else ''}", project)
    assert result.returncode == 0, result.stdout
    assert "ranks                2, ZeRO stage 2" in result.stdout
    assert_same_tensors(*(tensors_of(folder / "checkpoints/step-000004") for folder in (run, unbroken)))
