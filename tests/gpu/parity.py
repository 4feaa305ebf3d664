"""What ranks compute in bf16 under ZeRO, wherever they are: `test_parity.py` compares it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from agff.checkpoint import restore_checkpoint, save_checkpoint
from agff.engine import Engine, start_process_group
from agff.objectives.contrastive import Contrastive
from agff.optimizer import OptimizerConfig
from agff.similarity import FusionConfig
from agff.step import train_step
from tests.agff.test_step import PlainEngine, zero_config
from tests.agff.tiny import batch_of, global_rows, tiny_model

STAGES = (1, 2, 3)
LOCAL_PAIRS = 3
CHUNK_ROWS = 3
"""Six items, and two explicit negatives on rank 0: three chunks there, and so on all ranks."""
NUM_FINE = 4
EPSILON = 10.0
PROPORTIONAL = OptimizerConfig(learning_rate=1.0, beta1=0.0, epsilon=EPSILON, schedule="constant_with_warmup")
"""AdamW whose first step is gradient / (|gradient| + 10), so that rounding noise is not blown up."""
ORDINARY = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
NUM_STEPS, SAVED_STEP = 4, 2
OBJECTIVE, FUSION = Contrastive(temperature=0.2, amplification=2.0), FusionConfig(beta=0.2)
"""Soft, since bf16 moves a similarity by 0.004: at a temperature of 0.02 that is a fifth of a logit."""
Weights = dict[str, Tensor]


def new_engine(stage: int, optimizer: OptimizerConfig, *, overlap_comm: bool) -> Engine:
    """A tiny Qwen2-VL in bf16; small buckets, so that several are on their way at once. Collective."""
    config = zero_config(stage, LOCAL_PAIRS, clip=0.0) | {"bf16": {"enabled": True}}
    config["zero_optimization"] |= {"overlap_comm": overlap_comm, "reduce_bucket_size": 500}
    if stage > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return Engine(
        tiny_model(NUM_FINE).bfloat16(),
        deepspeed_config=config,
        optimizer=optimizer,
        num_steps=NUM_STEPS,
        autocast_dtype=None,
        device=start_process_group(dist.get_rank()),
    )


def take_step(engine: Engine, step: int) -> None:
    """With this rank's pairs of that step. Collective."""
    rows = global_rows(LOCAL_PAIRS * dist.get_world_size(), NUM_FINE, rows_without_image=range(0), seed=step)
    own = rows[dist.get_rank() * LOCAL_PAIRS :][:LOCAL_PAIRS]
    batch = batch_of(own, CHUNK_ROWS, NUM_FINE)
    if not train_step(engine, OBJECTIVE, FUSION, batch.to(engine.device)).applied:
        raise AssertionError("the gradient was not finite")


def master_weights(engine: Engine) -> Weights:
    """Whole, in float32, on the CPU. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: safe_get_full_fp32_param(p) for name, p in engine.model.named_parameters()}
    return {name: weight.detach().float().cpu().clone() for name, weight in found.items()}


def one_step(stage: int, *, overlap_comm: bool) -> Weights:
    """What one step adds to each weight. Collective."""
    engine = new_engine(stage, PROPORTIONAL, overlap_comm=overlap_comm)
    before = master_weights(engine)
    take_step(engine, 0)
    return {name: weight - before[name] for name, weight in master_weights(engine).items()}


def one_step_of_one_process(num_pairs: int) -> Weights:
    """The same of the whole batch in float64, without ranks, chunks, ZeRO or bf16 arithmetic."""
    engine = PlainEngine(tiny_model(NUM_FINE).bfloat16())
    rows = global_rows(num_pairs, NUM_FINE, rows_without_image=range(0), seed=0)
    train_step(engine, OBJECTIVE, FUSION, batch_of(rows, 3 * num_pairs, NUM_FINE))
    gradients = {name: p.grad for name, p in engine.model.named_parameters()}
    return {name: (-g / (g.abs() + EPSILON)).float() for name, g in gradients.items() if g is not None}


def continues_bit_for_bit(stage: int, folder: Path) -> bool:
    """Whether a run that is continued from a checkpoint ends with the weights of the unbroken one.
    Collective."""
    ends = []
    for start in (0, SAVED_STEP):
        engine = new_engine(stage, ORDINARY, overlap_comm=True)
        if start:
            restore_checkpoint(engine, folder, step=start, trainable_only=False)
        for step in range(start, NUM_STEPS):
            take_step(engine, step)
            if not start and step + 1 == SAVED_STEP:
                save_checkpoint(engine, folder, step=SAVED_STEP, state={}, trainable_only=False)
        ends.append(master_weights(engine))
    return all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def parity(folder: Path) -> dict[str, dict[int, Weights] | dict[int, bool]]:
    """Of every stage: a step with and without overlap_comm, and whether it resumes. Collective."""
    torch.use_deterministic_algorithms(True)  # else a GPU adds gradients in another order each time
    return {
        "overlap": {stage: one_step(stage, overlap_comm=True) for stage in STAGES},
        "no overlap": {stage: one_step(stage, overlap_comm=False) for stage in STAGES},
        "resumes": {stage: continues_bit_for_bit(stage, folder / str(stage)) for stage in STAGES},
    }
