"""Steps that take turns: ours as a training run makes them, a bare torch loop with the same mathematics, and
the public two-pass step over DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from agff.backbone import BackboneConfig, LoraConfig
from agff.batch import Batch, ModelInputs
from agff.engine import Engine, start_process_group
from agff.joined import encode_joined, groups_of
from agff.objectives.contrastive import Contrastive
from agff.optimizer import OptimizerConfig, build_adamw, build_schedule
from agff.processor import ProcessorConfig
from agff.step import train_step
from data_pipeline.collate import collate
from launcher.run.config import BatchConfig, DataConfig, ResolvedRun, RunConfig, resolve
from launcher.run.deepspeed_json import read_deepspeed_json
from launcher.run.hardware import Hardware
from launcher.run.model import build_model, untrained_model
from launcher.run.prompt_config import RunPrompts
from tests.benchmarks.peer import two_passes_over_ddp
from tests.benchmarks.synthetic import LIMITS, PROMPTS, examples, processor_of
from tests.benchmarks.table import Row
from tests.benchmarks.turns import Cases, Contender, Ratio, take_turns

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
LORA_RANK = 16
NUM_CHUNKS = {"one pass": 1, "4 chunks": 4}
LARGEST_WHOLE = 1000
"""Elements of the largest parameter that ZeRO-3 keeps on each rank: norms and biases, no matrix. So it is
with Qwen2-VL-2B, whose smallest matrices together exceed agff.zero3.RESIDENT_ELEMENTS; what is filled in for
a model as small as this one would keep all of it, and nothing would be gathered."""
PARTITIONED = "every matrix is partitioned, norms and biases are on each rank"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What ours and the bare loop have in common."""

    folder: Path
    num_pairs: int
    """Of the global batch."""
    with_lora: bool = False
    gradient_checkpointing: bool = False
    limits: ProcessorConfig = LIMITS
    image_side: int = 56
    precision: str = "fp32"
    """As RunConfig has it; float32 on every machine unless asked for something else."""
    loss: Contrastive = field(default_factory=Contrastive)
    first_pass_chunks: int = 4
    largest_whole: int | None = LARGEST_WHOLE
    """ZeRO-3's stage3_param_persistence_threshold; None: as a run fills it in."""

    def run(self, stage: int, num_chunks: int) -> ResolvedRun:
        """Of a training run."""
        world_size = dist.get_world_size()
        config = RunConfig(
            name="bench",
            num_steps=10**6,
            precision=self.precision,
            backbone=BackboneConfig(
                path=str(self.folder),
                lora=LoraConfig(rank=LORA_RANK, alpha=2 * LORA_RANK) if self.with_lora else None,
                gradient_checkpointing=self.gradient_checkpointing,
            ),
            prompts=RunPrompts(num_fine=PROMPTS.num_fine),
            processor=self.limits,
            loss=self.loss,
            optimizer=OptimizerConfig(learning_rate=1e-5),
            batch=BatchConfig(
                global_batch_size=self.num_pairs,
                chunk_size=2 * self.num_pairs // world_size // num_chunks,
                first_pass_chunks=self.first_pass_chunks,
            ),
            data=DataConfig(shards="", sub_batch_size=self.num_pairs),
        )
        return resolve(
            config,
            self._deepspeed(stage),
            deepspeed_name=f"zero{stage}",
            world_size=world_size,
            hardware=Hardware.of_this_machine(),
        )

    def _deepspeed(self, stage: int) -> dict[str, Any]:
        values = read_deepspeed_json(DS_CONFIGS / f"zero{stage}.json")
        if stage == 3 and self.largest_whole is not None:
            values["zero_optimization"]["stage3_param_persistence_threshold"] = self.largest_whole
        return values

    def batch(self, run: ResolvedRun) -> Batch:
        """This rank's share."""
        own = examples(self.num_pairs, image_side=self.image_side)[dist.get_rank() :: dist.get_world_size()]
        return collate(own, processor_of(self.folder, self.limits), chunking=run.chunking)


def engine_of(run: ResolvedRun) -> Engine:
    """As launcher/run/training.py makes it. Collective."""
    device = start_process_group(dist.get_rank())  # before the model: ZeRO-3 asks for the number of ranks
    return Engine(
        build_model(run, processor_of(Path(run.config.backbone.path), run.config.processor)),
        deepspeed_config=run.deepspeed,
        optimizer=run.config.optimizer,
        num_steps=run.config.num_steps,
        autocast_dtype=run.autocast_dtype,
        device=device,
        keep_vision=run.config.batch.keep_vision,
        first_pass_chunks=run.config.batch.first_pass_chunks,
    )


def our_steps(setting: Setting, stage: int, chunks: Sequence[str]) -> Cases:
    """`train_step` through the engine under ZeRO. Collective."""
    runs = {name: setting.run(stage, NUM_CHUNKS[name]) for name in chunks}
    run = next(iter(runs.values()))
    engine = engine_of(run)
    step = partial(train_step, engine, run.config.loss, run.config.fusion)
    return {name: partial(step, setting.batch(run)) for name, run in runs.items()}


def bare_steps(setting: Setting, chunks: Sequence[str]) -> Cases:
    """The same model, loss, chunks and optimizer in plain torch, over DDP where there are ranks.
    Collective."""
    runs = {name: setting.run(1, NUM_CHUNKS[name]) for name in chunks}
    run = next(iter(runs.values()))
    loop = BareLoop(run)
    return {name: partial(loop.step, setting.batch(run)) for name, run in runs.items()}


class BareLoop:
    """A model, an optimizer and what one step does."""

    def __init__(self, run: ResolvedRun) -> None:
        self.config = run.config
        self.model = untrained_model(run.config, dtype=torch.float32, attention="sdpa")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.ranks: nn.Module = self.model
        if dist.get_world_size() > 1:
            self.ranks = DistributedDataParallel(self.model)
        self.optimizer = build_adamw(self.trained, run.config.optimizer)
        self.schedule = build_schedule(self.optimizer, run.config.optimizer, num_steps=run.config.num_steps)
        self.autocast = partial(torch.autocast, "cpu", run.autocast_dtype, enabled=bool(run.autocast_dtype))

    def step(self, batch: Batch) -> None:
        """One optimizer step. Collective."""
        self.accumulate(batch)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def accumulate(self, batch: Batch) -> None:
        """The gradient. The first chunk keeps its graph; the others are encoded again, in the first pass as
        many at once as ours. Collective."""
        first, *others = batch.chunks
        sizes = [(chunk["input_ids"].shape[0], chunk["input_ids"].shape[1]) for chunk in others]
        found = []
        with torch.no_grad(), self.autocast():
            for group in groups_of(sizes, self.config.batch.first_pass_chunks):
                found += encode_joined(self.model, others[group], self.model.family)
        leaves = [chunk["embedding"].detach().requires_grad_() for chunk in found]
        with self._without_reduction(bool(others)):
            encoded = {"embedding": torch.cat([self._encode(first), *leaves])}
            self.config.loss(*batch.split(encoded), batch, self.config.fusion).loss.backward()
        for index, (chunk, leaf) in enumerate(zip(others, leaves, strict=True)):
            with self._without_reduction(index < len(others) - 1):
                (self._encode(chunk) * leaf.grad).sum().backward()

    def _encode(self, chunk: ModelInputs) -> Tensor:
        with self.autocast():
            return self.ranks(chunk)["embedding"]

    def _without_reduction(self, more_follows: bool) -> contextlib.AbstractContextManager[object]:
        if more_follows and isinstance(self.ranks, DistributedDataParallel):
            return self.ranks.no_sync()
        return contextlib.nullcontext()


def against_bare_loop(folder: Path, *, quick: bool, precision: str) -> list[Row]:
    """One and two ranks, ZeRO-1 to 3, one pass and four chunks."""
    setting = Setting(folder=folder, num_pairs=8 if quick else 64, precision=precision)
    found: dict[tuple[str, str], list[Row]] = {}
    for num_ranks in (1, 2):
        contenders = [
            Contender(
                name=f"ZeRO-{stage}",
                make=our_steps,
                arguments=(setting, stage, tuple(NUM_CHUNKS)),
                num_ranks=num_ranks,
            )
            for stage in (1, 2, 3)
        ]
        bare = Contender(
            name="bare", make=bare_steps, arguments=(setting, tuple(NUM_CHUNKS)), num_ranks=num_ranks
        )
        times = take_turns([bare, *contenders], **how_often(quick))
        for chunks in NUM_CHUNKS:
            for contender in contenders:
                found.setdefault((chunks, contender.name), []).append(
                    Row.of(
                        Ratio.of(times[contender.name, chunks], times["bare", chunks]),
                        group="step",
                        what=f"step of {setting.num_pairs} pairs, {chunks}",
                        case=f"{num_ranks} rank{'s' * (num_ranks > 1)} {contender.name}",
                        against="bare torch loop, DDP where there are 2 ranks",
                        quantity="time",
                        note=f"{precision}, bare {median_ms(times['bare', chunks])} ms"
                        + partitioned(contender.name),
                    )
                )
    return [row for chunks in NUM_CHUNKS for (of, _), rows in found.items() if of == chunks for row in rows]


def against_public_step(folder: Path, *, quick: bool) -> list[Row]:
    """Pairs/s of ours, K = 4 with EGA, beside the two-pass step over DDP with VLM2Vec's loss; two ranks, four
    chunks."""
    num_pairs = 8 if quick else 64
    full = Setting(folder=folder, num_pairs=num_pairs)
    lora = Setting(folder=folder, num_pairs=num_pairs, with_lora=True)
    ours = {
        "ZeRO-1": (full, 1, "public"),
        "ZeRO-3": (full, 3, "public"),
        "frozen tower + LoRA, ZeRO-2": (lora, 2, "public with LoRA"),
    }
    contenders = [
        Contender(name=name, make=our_steps, arguments=(setting, stage, ("4 chunks",)), num_ranks=2)
        for name, (setting, stage, _) in ours.items()
    ]
    contenders += [
        Contender(
            name=name, make=two_passes_over_ddp, arguments=(folder, num_pairs, 4, lora_rank), num_ranks=2
        )
        for name, lora_rank in (("public", None), ("public with LoRA", LORA_RANK))
    ]
    times = take_turns(contenders, **how_often(quick))
    return [
        Row.of(
            Ratio.of(times[other, "step"], times[name, "4 chunks"]),
            group="peers",
            what=f"step of {num_pairs} pairs, 2 ranks, 4 chunks, K = 4, EGA",
            case=name,
            against="two-pass step over DDP, VLM2Vec's loss",
            quantity="pairs/s",
            note=f"theirs {median_ms(times[other, 'step'])} ms a step{partitioned(name)}",
        )
        for name, (_, _, other) in ours.items()
    ]


def how_often(quick: bool) -> dict[str, int]:
    """Of `take_turns`."""
    return {"rounds": 2 if quick else 12, "repeats": 1}


def partitioned(contender: str) -> str:
    """For the note of a row: what ZeRO-3 keeps whole."""
    return f"; {PARTITIONED}" if contender == "ZeRO-3" else ""


def median_ms(times: Sequence[float]) -> str:
    """For the note of a row."""
    return f"{1e3 * torch.tensor(times).median():.0f}"
