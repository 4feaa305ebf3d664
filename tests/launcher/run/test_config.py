from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from agff.errors import ConfigError
from data_pipeline.collate import FixedRows
from launcher.command_line import DEEPSPEED_CONFIGS, RECIPES, config_from_values, parse_train_arguments
from launcher.run.changes import differences
from launcher.run.config import RunConfig, as_dict, resolve
from launcher.run.deepspeed_json import read_deepspeed_json
from launcher.run.hardware import Hardware

CPU = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=True)


def quickstart(*overrides: str) -> RunConfig:
    return parse_train_arguments(overrides).config


def resolve_on(config: RunConfig, world_size: int = 2):
    values = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}
    return resolve(config, values, deepspeed_name="zero3", world_size=world_size, hardware=CPU)


def test_without_arguments_the_quickstart_runs_under_zero3() -> None:
    arguments = parse_train_arguments([])
    assert arguments.config.name == "quickstart"
    assert arguments.deepspeed.name == "zero3.json"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_parses_and_survives_the_run_folder(recipe: str) -> None:
    config = parse_train_arguments(["--recipe", recipe]).config
    assert config_from_values(as_dict(config)) == config
    assert resolve_on(config, world_size=8).local_batch_size * 8 == config.batch.global_batch_size


@pytest.mark.parametrize("order", [0, 1])
def test_overrides_win_over_the_recipe_wherever_it_stands(order: int) -> None:
    pairs = [["--recipe", "quickstart"], ["--loss.temperature", "0.5"]]
    argv = [word for pair in (pairs if order else reversed(pairs)) for word in pair]
    assert parse_train_arguments(argv).config.loss.temperature == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss.temprature", "1"], "temprature.*--help"),
        (["--loss.temperature", "0"], r"loss.temperature=0.0 must be > 0"),
        (["--loss.temperature", "warm"], "loss.temperature.*float.*warm"),
        (["--fusion.beta", "-1"], r"fusion.beta=-1.0 must be > 0"),
        (["--loss.amplification", "-1"], "loss.amplification=-1.0 must be >= 0"),
        (["--prompts.num_fine", "-1"], "prompts.num_fine=-1 must be >= 0"),
        (["--prompts.tokens_per_prompt", "5"], "must be 1, 2, 3 or 4"),
        (["--batch.chunk_size", "0"], "batch.chunk_size=0 must be >= 1"),
        (["--num_steps", "0"], "num_steps=0 must be >= 1"),
        (
            ["--recipe", "nothing"],
            "--recipe nothing: no such recipe; give a YAML file or one of .*quickstart",
        ),
        (["--backbone.lora.rank", "0"], "backbone.lora.rank=0 must be >= 1"),
        (
            ["--processor.min_pixels", "9", "--processor.max_pixels", "4"],
            "min_pixels=9 must be <= processor.max_pixels=4",
        ),
    ],
)
def test_wrong_settings_are_one_clear_message(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_train_arguments(argv)


def test_unknown_recipe_key(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((RECIPES / "quickstart.yaml").read_text() + "\nlearning_rat: 3\n")
    with pytest.raises(ConfigError, match="learning_rat"):
        parse_train_arguments(["--recipe", str(recipe)])


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["--batch.global_batch_size", "100"], 64, "100 is not a multiple of 64 ranks; use 64 or 128"),
        (["--batch.global_batch_size", "8"], 64, "8 is not a multiple of 64 ranks; use 64 "),
        (
            ["--batch.chunk_size", "24"],
            2,
            "chunk_size=24 does not divide the local batch of 64 rows; use 16 or 32",
        ),
        (["--data.sub_batch_size", "48"], 2, "128 is not a multiple of data.sub_batch_size=48"),
        (
            ["--optimizer.warmup_steps", "300", "--num_steps", "300"],
            2,
            "warmup_steps=300 must be below num_steps=300",
        ),
    ],
)
def test_what_needs_two_parts_is_checked_together(
    overrides: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_on(quickstart(*overrides), world_size)


def test_batch_sizes_and_precision_are_filled_into_the_deepspeed_config() -> None:
    run = resolve_on(quickstart("--batch.global_batch_size", "128", "--batch.chunk_size", "16"), world_size=4)
    assert run.deepspeed["train_batch_size"] == 128
    assert run.deepspeed["train_micro_batch_size_per_gpu"] == run.local_batch_size == 32
    assert run.deepspeed["gradient_accumulation_steps"] == 1
    assert run.chunking == FixedRows(rows=16)
    assert not run.one_pass
    assert run.precision == "bf16_autocast"
    assert run.deepspeed["bf16"] == {"enabled": False}
    assert run.run_dir == Path("runs/quickstart-zero3")


@pytest.mark.parametrize("values", [{"train_batch_size": 8}, {"bf16": {"enabled": True}}, {"optimizer": {}}])
def test_deepspeed_json_may_not_decide_what_the_recipe_decides(values: dict, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}, **values}))
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must not stand in this file"):
        read_deepspeed_json(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, '"zero_optimization" must be an object whose "stage" is 1, 2 or 3'),
        ({"zero_optimization": []}, '"zero_optimization" must be an object'),
        (
            {"zero_optimization": {"stage": 0}},
            '"stage" is 1, 2 or 3; without ZeRO a gradient that is not finite would',
        ),
        (
            {"zero_optimization": {"stage": 3}, "checkpoint": {"writer": {"decoupled": True}}},
            "checkpoint: DeepSpeed's own",
        ),
        ({"zero_optimization": {"stage": 3}}, '"gradient_clipping" is missing'),
    ],
)
def test_deepspeed_json_that_would_train_wrongly_is_refused(
    values: dict, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_json(path)


def test_deepspeed_json_must_be_readable(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("[1")
    with pytest.raises(ConfigError, match=r"ds.json: cannot read"):
        read_deepspeed_json(path)
    with pytest.raises(ConfigError, match=r"absent.json: cannot read"):
        read_deepspeed_json(tmp_path / "absent.json")


@pytest.mark.parametrize("path", sorted(DEEPSPEED_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_our_deepspeed_files_are_accepted(path: Path) -> None:
    assert read_deepspeed_json(path)["gradient_clipping"] == 1.0


def test_differences_name_what_changes_the_mathematics() -> None:
    old = quickstart()
    new = dataclasses.replace(old, save_every=7, fusion=dataclasses.replace(old.fusion, beta=0.1))
    assert differences(as_dict(old), as_dict(new)) == ["fusion.beta: 0.05 -> 0.1"]
    lora = quickstart("--backbone.lora.rank", "4")
    assert differences(as_dict(old), as_dict(lora)) == [
        "backbone.lora: None -> {'rank': 4, 'alpha': 16, 'dropout': 0.0}"
    ]


@pytest.mark.parametrize(
    ("hardware", "wanted", "expected"),
    [
        (Hardware(has_gpu=True, gpu_has_bf16=True, cpu_has_bf16=False), "auto", "bf16"),
        (Hardware(has_gpu=True, gpu_has_bf16=False, cpu_has_bf16=True), "auto", "fp32"),
        (Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=False), "auto", "fp32"),
        (CPU, "auto", "bf16_autocast"),
        (CPU, "fp32", "fp32"),
    ],
)
def test_precision_follows_the_machine(hardware: Hardware, wanted: str, expected: str) -> None:
    assert hardware.choose_precision(wanted) == expected


def test_bf16_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="no bf16 arithmetic"):
        Hardware(has_gpu=True, gpu_has_bf16=False, cpu_has_bf16=True).choose_precision("bf16")
