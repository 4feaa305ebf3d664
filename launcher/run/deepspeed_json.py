"""The DeepSpeed JSON of a run: mechanism only."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from agff.errors import ConfigError
from launcher.run.plain_values import describe, fail_with_all, parse_json, read_text
from launcher.run.typed_values import TypeCheck

FILLED_IN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "steps_per_print",
)
"""Keys of the DeepSpeed JSON that belong to the recipe; they are filled in here and refused in the file."""

UNSAFE_WRITERS = ("checkpoint", "nebula", "datastates_ckpt")
"""Keys of DeepSpeed's own asynchronous writers of checkpoints."""


def _hints(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The types of DeepSpeed's defaults; where one is None DeepSpeed wants a count."""
    return {key: int | None if default is None else type(default) for key, default in defaults.items()}


MECHANISM: dict[str, Any] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "gradient_clipping": float,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_allow_untested_optimizer": bool,
    "communication_data_type": Literal["fp32", "fp16", "bf16"] | None,
    "data_types": {"grad_accum_dtype": Literal["fp32", "fp16", "bf16"] | None},
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "disable_allgather": bool,
    "activation_checkpointing": _hints(ACT_CHKPT_DEFAULT),
    "aio": _hints(AIO_DEFAULT_DICT),
    "compile": CompileConfig,
    "comms_logger": CommsLoggerConfig,
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str | None,
    },
    "timers": {"throughput": DeepSpeedThroughputTimerConfig},
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "log_level": str | None,
    **{key: field.annotation for key, field in DeepSpeedMonitorConfig.model_fields.items()},
}
"""What a file may hold, with its types: DeepSpeed's own models where it has one."""


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The mechanism file. Raises one ConfigError that lists what is wrong: unreadable, keys given twice or
    unknown, values of another type or out of range, clipping not stated, keys that belong to the recipe."""
    try:
        values = parse_json(read_text(path, "the DeepSpeed configuration"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: cannot read the DeepSpeed configuration: no such file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {describe(values)}")
    problems = _of_the_recipe(values)
    rest = {key: value for key, value in values.items() if key not in (*FILLED_IN, *UNSAFE_WRITERS)}

    def note(name: str, text: str) -> None:
        is_auto = text.startswith("expected") and "the text 'auto'" in text
        trainer = (
            '; "auto" is filled in by the Trainer of transformers only: write the value, or remove the key'
        )
        problems.append(f"{name}: {text}{trainer if is_auto else ''}")

    TypeCheck(problem=note, fields_of=_fields_of, is_json=True).keys(rest, MECHANISM, "")
    if not problems:
        problems = _out_of_range(values)
    fail_with_all([f"{path}: {problem}" for problem in problems])
    return values


def _of_the_recipe(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys themselves, whatever their values."""
    problems = []
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict) or "stage" not in zero or zero["stage"] == 0:
        problems.append(
            '"zero_optimization" must be an object whose "stage" is 1, 2 or 3; without ZeRO a gradient that '
            "is not finite would go into the parameters"
        )
    if writers := [key for key in UNSAFE_WRITERS if key in values]:
        problems.append(
            f"{', '.join(writers)}: DeepSpeed's own asynchronous writers cannot be used: when their process "
            "dies, saves are left out silently. Checkpoints are written, synced and hashed before they get "
            "their name"
        )
    if "gradient_clipping" not in values:
        problems.append(
            '"gradient_clipping" is missing; DeepSpeed would clip at 1.0 silently, so state it (0.0 for none)'
        )
    if taken := [key for key in FILLED_IN if key in values]:
        problems.append(
            f"{', '.join(taken)} must not be in this file; batch sizes, precision and optimizer come from "
            "the recipe (--batch.global_batch_size, --precision, --optimizer.*) and are filled in"
        )
    return problems


def _out_of_range(values: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed's own models refuse of values whose types are right."""
    problems = []
    if values["gradient_clipping"] < 0:
        problems.append(f"gradient_clipping: {values['gradient_clipping']} must be >= 0; 0.0 clips nothing")
    for key, hint in MECHANISM.items():
        model = _model_in(hint)
        if key not in values or model is None:
            continue
        try:
            model(**values[key])
        except ValidationError as error:
            for found in error.errors():
                name = ".".join(map(str, (key, *found["loc"])))
                problems.append(f"{name}: {found['msg']}, found {describe(found['input'])}")
        except (AssertionError, ValueError) as error:
            problems.append(f"{key}: {error}")
    return problems


def _model_in(hint: Any) -> type[BaseModel] | None:
    """The pydantic model of a hint, also of one that may be None."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else (hint,)
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _fields_of(hint: Any) -> Mapping[str, Any] | None:
    """Name -> hint of the keys of a section; a pydantic field goes by its alias and by its name."""
    if isinstance(hint, dict):
        return hint
    if not (isinstance(hint, type) and issubclass(hint, BaseModel)):
        return None
    names = {}
    for name, field in hint.model_fields.items():
        names[field.alias or name] = field.annotation
        names[name] = field.annotation
    return names
