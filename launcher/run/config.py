"""One run's configuration: a YAML recipe, dotted overrides, a DeepSpeed JSON; and `resolve`, which checks
them together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from agff.backbone import BackboneConfig
from agff.batch import TextRule
from agff.errors import ConfigError
from agff.objectives import OBJECTIVES
from agff.objectives.contrastive import Contrastive
from agff.optimizer import OptimizerConfig
from agff.processor import ProcessorConfig
from agff.similarity import FusionConfig
from data_pipeline.collate import Chunking, FixedRows, TokenBudget
from launcher.run.batch_config import BatchConfig
from launcher.run.data_config import DataConfig
from launcher.run.hardware import Hardware, Precision
from launcher.run.prompt_config import RunPrompts
from launcher.validation.config import ValidationConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run; one recipe file."""

    name: str
    """Names the run folder."""
    run_dir: str | None = None
    """Where the run lives; null: runs/<name>-<DeepSpeed file>."""
    deepspeed: str | None = None
    """DeepSpeed JSON, mechanism only: a file, relative to the working folder as every path of a recipe, or
    the name of one in ds_configs."""
    seed: int = 0
    num_steps: int
    """Optimizer steps of the whole run; the schedule ends there."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep_last: int | None = 3
    """The newest checkpoints that are kept; older ones are removed. null: all are kept."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are kept beside them."""
    validate_every: int | None = None
    """Steps between validations, on what the section validation names; there is always one at the end.
    null: none."""
    keep_best: str | None = None
    """Score by which the best checkpoint is kept beside the newest, as `mmeb`; an unknown one is answered
    with the list of them. validate_every must be a multiple of save_every. null: none is kept for its
    score."""
    max_skipped_in_a_row: int = 10
    """Steps in a row whose gradient may be not finite (such a step changes nothing) before all ranks stop."""
    loss_spike_deviations: float | None = 6.0
    """A loss more than this many standard deviations above the mean of the last 100 steps is logged with its
    worst pairs. null: never."""
    collective_timeout_s: float = 1800
    """A rank that waits longer than this for the others ends: they are gone, or cut off."""
    stalled_step_s: float = 900
    """A rank that stays longer than this in one step or one save logs what it does, with the stacks of its
    threads."""
    log_every: int = 1
    """Steps between entries in TensorBoard and the progress bar."""
    log_samples: bool = False
    """Write which pairs each step trained on: <run>/samples/<rank>-of-<ranks>.jsonl."""
    precision: Literal["auto", "bf16", "bf16_autocast", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it; on a CPU bf16 arithmetic with float32 weights where it is fast; else
    fp32."""
    cpu_ranks: int = 2
    """Ranks started on a machine without an accelerator when the launcher asked for one."""
    backbone: BackboneConfig
    prompts: RunPrompts = field(default_factory=RunPrompts)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    texts: TextRule = field(default_factory=TextRule)
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    objective: str = "contrastive"
    """What is trained for: a name of agff.objectives.OBJECTIVES; its settings are the section loss."""
    loss: Contrastive = field(default_factory=Contrastive)
    """Of another objective that one's settings: see run_config_of."""
    optimizer: OptimizerConfig
    batch: BatchConfig
    data: DataConfig
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if type(self.loss) is not OBJECTIVES.get(self.objective):
            raise ConfigError(
                f"objective={self.objective} does not fit loss, which is {type(self.loss).__name__}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be >= 0")
        for name in (
            "num_steps",
            "save_every",
            "validate_every",
            "log_every",
            "cpu_ranks",
            "keep_last",
            "keep_every",
            "loss_spike_deviations",
            "collective_timeout_s",
            "stalled_step_s",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be >= 1")
        self.validation.check(
            validate_every=self.validate_every, keep_best=self.keep_best, save_every=self.save_every
        )


@functools.cache
def run_config_of(objective: str) -> type[RunConfig]:
    """RunConfig whose section `loss` is that objective's. Raises ConfigError for an unknown one."""
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"expected one of {', '.join(OBJECTIVES)}, found {objective}; without it: contrastive"
        )
    cls = OBJECTIVES[objective]
    if cls is Contrastive:
        return RunConfig
    has_defaults = all(
        setting.default is not MISSING or setting.default_factory is not MISSING
        for setting in dataclasses.fields(cls)
    )
    section = field(default_factory=cls) if has_defaults else field()
    return dataclasses.make_dataclass(
        "RunConfig", [("loss", cls, section)], bases=(RunConfig,), frozen=True, kw_only=True
    )


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """What will run: nothing is left to be decided."""

    config: RunConfig
    deepspeed: dict[str, Any]
    precision: Precision
    run_dir: Path
    world_size: int
    local_batch_size: int
    chunking: Chunking
    most_negatives: int
    """Explicit negatives of one pair at most."""

    @property
    def most_items(self) -> int:
        """Of this rank's batch: queries, targets and, at most, explicit negatives."""
        return (2 + self.most_negatives) * self.local_batch_size

    def with_most_negatives(self, count: int) -> ResolvedRun:
        """The same run on data of which one pair has this many explicit negatives at most."""
        if not self.config.data.with_negatives or count == self.most_negatives:
            return self
        run = dataclasses.replace(self, most_negatives=count)
        return dataclasses.replace(run, chunking=_chunking(self.config, run.most_items))

    @property
    def is_searched(self) -> bool:
        """Whether chunks or checkpointing are found before the first step (launcher/run/chunk_search.py)."""
        auto = (self.config.batch.chunk_size, self.config.backbone.gradient_checkpointing)
        return "auto" in auto

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Number format of the matrix products where the weights are float32."""
        return torch.bfloat16 if self.precision == "bf16_autocast" else None

    @property
    def zero_stage(self) -> int:
        """1 to 3."""
        return self.deepspeed["zero_optimization"]["stage"]


def resolve(
    config: RunConfig,
    deepspeed_values: Mapping[str, Any],
    *,
    deepspeed_name: str,
    world_size: int,
    hardware: Hardware,
) -> ResolvedRun:
    """Check everything that needs two parts at once and fill in the rest. Pure; raises ConfigError."""
    local_batch_size = _local_batch_size(config, world_size)
    precision = hardware.choose_precision(config.precision)
    if config.optimizer.warmup_steps >= config.num_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
            f"num_steps={config.num_steps}"
        )
    config.loss.check_sizes(
        global_batch_size=config.batch.global_batch_size, num_fine=config.prompts.num_fine
    )
    deepspeed = {
        **deepspeed_values,
        "train_batch_size": config.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": local_batch_size,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
    }
    if precision == "bf16" and deepspeed_values["zero_optimization"]["stage"] > 1:
        # else the chunks' gradients are summed in bf16
        deepspeed.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    run_dir = Path(config.run_dir) if config.run_dir else Path("runs") / f"{config.name}-{deepspeed_name}"
    most_negatives = int(config.data.with_negatives)  # until the data are opened
    return ResolvedRun(
        config=config,
        deepspeed=deepspeed,
        precision=precision,
        run_dir=run_dir,
        world_size=world_size,
        local_batch_size=local_batch_size,
        chunking=_chunking(config, (2 + most_negatives) * local_batch_size),
        most_negatives=most_negatives,
    )


def _local_batch_size(config: RunConfig, world_size: int) -> int:
    global_batch_size = config.batch.global_batch_size
    if global_batch_size % world_size:
        lower = global_batch_size // world_size * world_size
        nearest = " or ".join(str(size) for size in (lower, lower + world_size) if size)
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of {world_size} ranks; "
            f"use {nearest} (--batch.global_batch_size)"
        )
    if global_batch_size % config.data.sub_batch_size:
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of "
            f"data.sub_batch_size={config.data.sub_batch_size}; a global batch is made of whole "
            "single-source sub-batches"
        )
    return global_batch_size // world_size


def _chunking(config: RunConfig, most_items: int) -> Chunking:
    chunk_size, max_tokens = config.batch.chunk_size, config.batch.max_tokens_per_chunk
    if max_tokens is not None:
        if max_tokens < config.processor.max_tokens:
            raise ConfigError(
                f"batch.max_tokens_per_chunk={max_tokens} is below "
                f"processor.max_tokens={config.processor.max_tokens}, so the longest item would not fit; "
                "raise the one or lower the other"
            )
        return TokenBudget(max_tokens=max_tokens)
    assert chunk_size is not None, "BatchConfig checks it"
    if chunk_size == "auto":  # until launcher/run/chunk_search.py has found what fits
        chunk_size = most_items
    return FixedRows(rows=chunk_size)


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values, for YAML and JSON."""
    return dataclasses.asdict(config)
