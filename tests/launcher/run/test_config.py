from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agff.errors import ConfigError
from data_pipeline.collate import FixedRows
from launcher.command_line import RECIPES, parse_train_arguments
from launcher.run.changes import differences
from launcher.run.config import RunConfig, as_dict, resolve
from launcher.run.hardware import Hardware

CPU = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=True)


def quickstart(*overrides: str) -> RunConfig:
    return parse_train_arguments(overrides).config


def resolve_on(config: RunConfig, world_size: int = 2):
    values = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}
    return resolve(config, values, deepspeed_name="zero3", world_size=world_size, hardware=CPU)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_parses_and_can_be_resolved(recipe: str) -> None:
    config = parse_train_arguments(["--recipe", recipe]).config
    assert resolve_on(config, world_size=8).local_batch_size * 8 == config.batch.global_batch_size


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["--batch.global_batch_size", "100"], 64, "100 is not a multiple of 64 ranks; use 64 or 128"),
        (["--batch.global_batch_size", "8"], 64, "8 is not a multiple of 64 ranks; use 64 "),
        (["--data.sub_batch_size", "48"], 2, "64 is not a multiple of data.sub_batch_size=48"),
        (
            ["--optimizer.warmup_steps", "300", "--num_steps", "300"],
            2,
            "warmup_steps=300 must be below num_steps=300",
        ),
        (["--loss.nested_fine", "[0, 5]"], 2, r"nested_fine=\[0, 5\] must be <= prompts.num_fine=4"),
        (["--loss.num_hardest", "64"], 2, "num_hardest=64 must be below global_batch_size=64: a row has 63"),
    ],
)
def test_what_needs_two_parts_is_checked_together(
    overrides: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_on(quickstart(*overrides), world_size)


def test_the_largest_number_of_negatives_in_the_data_decides_how_many_items_a_batch_may_have() -> None:
    run = resolve_on(quickstart("--batch.global_batch_size", "64", "--batch.chunk_size", "auto"))
    assert (run.most_items, run.chunking) == (3 * 32, FixedRows(rows=3 * 32)), "before the data are opened"
    for count in (0, 1, 5):
        of_data = run.with_most_negatives(count)
        assert (of_data.most_items, of_data.chunking) == ((2 + count) * 32, FixedRows(rows=(2 + count) * 32))
    without = resolve_on(quickstart("--batch.global_batch_size", "64", "--data.with_negatives", "false"))
    assert without.with_most_negatives(5) == without
    assert without.most_items == 2 * 32


def test_batch_sizes_and_precision_are_filled_into_the_deepspeed_config() -> None:
    run = resolve_on(quickstart("--batch.global_batch_size", "128", "--batch.chunk_size", "16"), world_size=4)
    assert run.deepspeed["train_batch_size"] == 128
    assert run.deepspeed["train_micro_batch_size_per_gpu"] == run.local_batch_size == 32
    assert run.deepspeed["gradient_accumulation_steps"] == 1
    assert run.chunking == FixedRows(rows=16)
    assert run.precision == "bf16_autocast"
    assert run.deepspeed["bf16"] == {"enabled": False}
    assert run.run_dir == Path("runs/quickstart-zero3")


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


OUT_OF_RANGE = [
    ("backbone.lora.alpha", "0"),
    ("backbone.lora.dropout", "1.0"),
    ("backbone.lora.dropout", "-0.1"),
    ("optimizer.weight_decay", "-0.1"),
    ("optimizer.beta1", "1.0"),
    ("optimizer.beta2", "-0.1"),
    ("optimizer.epsilon", "0.0"),
    ("processor.min_pixels", "0"),
    ("processor.max_pixels", "-1"),
    ("loss.num_hardest", "0"),
    ("loss.hardness_weight", "-1.0"),
]


def test_the_most_of_the_hardest_is_the_batch_without_the_row() -> None:
    assert resolve_on(quickstart("--loss.num_hardest", "63")).config.loss.num_hardest == 63


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_before_a_library_meets_them(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must be >"):
        quickstart(f"--{name}", value)
