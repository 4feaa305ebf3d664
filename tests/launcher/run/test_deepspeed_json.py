"""A DeepSpeed JSON of the user: whatever is wrong in it is named before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agff.errors import ConfigError
from launcher.command_line import DEEPSPEED_CONFIGS
from launcher.run.deepspeed_json import MECHANISM, read_deepspeed_json

RIGHT: dict[str, Any] = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}


def read(tmp_path: Path, values: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return read_deepspeed_json(path)


def with_value(key: str, value: Any) -> dict[str, Any]:
    """RIGHT, with one dotted key."""
    values = json.loads(json.dumps(RIGHT))
    *sections, last = key.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return values


@pytest.mark.parametrize("path", sorted(DEEPSPEED_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_our_deepspeed_files_are_accepted(path: Path) -> None:
    assert read_deepspeed_json(path)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_clipping", 0),
        ("zero_optimization.reduce_bucket_size", 5e8),
        ("zero_optimization.prefetch_bucket_size", 1),
        ("zero_optimization.stage3_prefetch_bucket_size", 1),
        ("zero_optimization.overlap_comm", None),
        ("zero_optimization.offload_optimizer", {"device": "cpu", "ratio": 0.5}),
        ("zero_optimization.offload_param", {"device": "nvme", "nvme_path": "/disk"}),
        ("zero_optimization.leaf_module", {"classes": ["a.B"]}),
        ("communication_data_type", "fp32"),
        ("data_types.grad_accum_dtype", "fp32"),
        ("activation_checkpointing.number_checkpoints", 3),
        ("comms_logger.prof_ops", ["all_reduce"]),
        ("comms_logger.enabled", True),
        ("timers.throughput.enabled", False),
        ("flops_profiler.profile_step", 2),
        ("tensorboard.enabled", False),
    ],
)
def test_what_deepspeed_documents_is_accepted(key: str, value: Any, tmp_path: Path) -> None:
    values = with_value(key, value)
    assert read(tmp_path, values) == values


WRONG = [
    *(
        ("gradient_clipping", value, "expected a number")
        for value in ("auto", "1.0", "1e0", None, True, [1.0], {}, False)
    ),
    ("gradient_clipping", -1, "must be >= 0"),
    *(
        ("zero_optimization.stage", value, "expected one of 0, 1, 2, 3")
        for value in ("3", "auto", True, 3.0, 4)
    ),
    *(
        ("zero_optimization.reduce_bucket_size", value, "expected a whole number")
        for value in ("auto", "500", True, 0.5, None)
    ),
    ("zero_optimization.reduce_bucket_size", 0, "greater than 0"),
    *(("zero_optimization.overlap_comm", value, "expected true or false") for value in ("auto", "true", 1)),
    ("zero_optimization.offload_optimizer", "cpu", "expected a mapping or null"),
    ("zero_optimization.offload_optimizer.device", "gpu", "expected one of none, cpu, nvme"),
    ("zero_optimization.offload_optimizer.pin_memory", 1, "expected true or false"),
    ("zero_optimization.offload_optimizer.ratio", "0.5", "expected a number"),
    ("zero_optimization.leaf_module.classes", ["a.B", 3], "expected text"),
    ("communication_data_type", "float32", "expected one of fp32, fp16, bf16"),
    ("data_types.grad_accum_dtype", 32, "expected one of fp32, fp16, bf16"),
    ("activation_checkpointing.profile", "no", "expected true or false"),
    ("comms_logger.enabled", "yes", "expected true or false"),
    ("wall_clock_breakdown", 1, "expected true or false"),
    ("aio.block_size", "1MB", "expected a whole number"),
    ("timers", True, "expected a mapping of throughput"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_values_are_checked_for_their_type(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"ds.json: {key}[.\d]*: .*{message}") as caught:
        read(tmp_path, with_value(key, value))
    assert ("Trainer of transformers" in str(caught.value)) == (value == "auto")


@pytest.mark.parametrize("key", MECHANISM)
def test_no_key_takes_whatever_it_is_given(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"ds.json.*{key}"):
        read(tmp_path, with_value(key, [["auto"]]))


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("gradient_cliping", "did you mean gradient_clipping"),
        ("zero_optimization.stage3_prefetch_bucket_sizes", "did you mean .*stage3_prefetch_bucket_size"),
        ("zero_optimization.offload_optimizer.pin_memry", "did you mean .*offload_optimizer.pin_memory"),
        ("activation_checkpointing.partitioned_activations", "did you mean .*partition_activations"),
        ("elasticity", "known: zero_optimization, gradient_clipping"),
    ],
)
def test_misspelt_keys_are_named_with_near_ones(key: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"ds.json: {key}: unknown; {remedy}"):
        read(tmp_path, with_value(key, 1))


def test_all_findings_are_listed(tmp_path: Path) -> None:
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlapp_comm": True}
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {"zero_optimization": zero, "train_batch_size": "auto", "wall_clock_breakdown": "no"})
    text = str(caught.value)
    assert text.startswith("5 problems:")
    for finding in (
        '"gradient_clipping" is missing',
        "train_batch_size must not be",
        "overlapp_comm: unknown",
    ):
        assert finding in text
    assert text.count("ds.json: ") == 5


@pytest.mark.parametrize("values", [{"train_batch_size": 8}, {"bf16": {"enabled": True}}, {"optimizer": {}}])
def test_it_may_not_decide_what_the_recipe_decides(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must not be in this file"):
        read(tmp_path, {**RIGHT, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, '"zero_optimization" must be an object whose "stage" is 1, 2 or 3'),
        ({"zero_optimization": []}, '"zero_optimization" must be an object'),
        ({"zero_optimization": {}}, '"zero_optimization" must be an object whose "stage" is'),
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
def test_what_would_train_wrongly_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "ds.json: not JSON"),
        ("[1]", "ds.json: expected a JSON object, found a list"),
        (
            '{"gradient_clipping": 1.0, "gradient_clipping": 0.5}',
            'the key "gradient_clipping" is given 2 times',
        ),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', 'the key "stage" is given 2 times'),
        ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
    ],
)
def test_it_must_be_plain_json(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_it_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.json: cannot read"):
        read_deepspeed_json(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=r"cannot read"):
        read_deepspeed_json(tmp_path)
