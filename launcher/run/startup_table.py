"""The table printed before the first step: what will run, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModel

from agff.backbone import choose_trainable
from agff.embedding_model import EmbeddingModel
from agff.fused_loss import block_elements
from data_pipeline.collate import TokenBudget
from data_pipeline.remote import open_folder
from data_pipeline.storage import LocalFolder
from launcher.run.chunk_search import CHUNK_FILE
from launcher.run.config import ResolvedRun, RunConfig
from launcher.run.data_config import DataConfig
from launcher.run.first_stage import backbone_folder, first_stage_row


def startup_table(
    run: ResolvedRun,
    num_samples: Mapping[str, int],
    num_trainable: int,
    num_parameters: int,
    *,
    measured: Mapping[str, str],
    validation: str,
) -> str:
    """Aligned lines `name  value`. num_samples: per source. measured: rows of the first batches
    (launcher/run/measured_batches.py). validation: on what, and how often."""
    config = run.config
    num_pairs = config.batch.global_batch_size
    lora = f"LoRA rank {config.backbone.lora.rank}" if config.backbone.lora else "full tuning"
    total = sum(num_samples.values())
    rows = {
        "backbone": f"{config.backbone.path}, {num_parameters / 1e6:,.1f} M parameters",
        "trainable": f"{num_trainable / 1e6:,.1f} M ({lora}), {run.precision}",
        "embeddings per item": (
            f"{config.prompts.num_vectors} = 1 global + {config.prompts.num_fine} fine-grained"
        ),
        **first_stage_row(config),
        "ranks": f"{run.world_size}, ZeRO stage {run.zero_stage}",
        "batch": (
            f"local {run.local_batch_size} x {run.world_size} ranks = global {num_pairs}; {_chunks(run)}"
        ),
        **measured,
        "negatives per query": f"{num_pairs - 1}, less those that share a target or a query"
        f"{', and the explicit ones of the data' if config.data.with_negatives else ''}; "
        "gradient accumulation would add none, so there is none",
        "loss memory": f"{_loss_bytes(run) / 2**20:,.0f} MiB a rank, beside the gradients of all embeddings",
        "parameter gathers": _parameter_gathers(run),
        "data": (
            f"{total:,} pairs of {len(num_samples)} sources; {config.data.sub_batch_size} pairs in turn from "
            "one source"
        ),
        "shards": _shards(config.data),
        "steps": f"{config.num_steps:,} = {config.num_steps * num_pairs:,} pairs = "
        f"{config.num_steps * num_pairs / max(total, 1):.2f} x the data",
        "validation": validation,
        "run folder": str(run.run_dir),
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def count_parameters(config: RunConfig) -> tuple[int, int]:
    """(trainable, all) of the model as it will be built, counted without allocating it."""
    with torch.device("meta"):
        backbone = AutoModel.from_config(
            AutoConfig.from_pretrained(backbone_folder(config.backbone.path), local_files_only=True)
        )
        head = config.loss.build_head(backbone.config)
        model = EmbeddingModel(choose_trainable(backbone, config.backbone), config.prompts, head)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def _loss_bytes(run: ResolvedRun) -> int:
    """The one block of float32 that the loss works in; the gradients of the vectors come on top."""
    return 4 * block_elements(
        run.local_batch_size, run.config.batch.global_batch_size, run.config.prompts.num_vectors
    )


def _shards(config: DataConfig) -> str:
    if isinstance(open_folder(config.shards, config.cache), LocalFolder):
        return config.shards
    return f"{config.shards}, through a cache of at most {config.cache.max_gib:g} GiB in {config.cache.dir}"


def _chunks(run: ResolvedRun) -> str:
    if run.config.batch.chunk_size == "auto":
        return f"chunks of what fits, found before the first step, or in {CHUNK_FILE} of the run folder"
    if isinstance(run.chunking, TokenBudget):
        return f"chunks of {run.chunking.max_tokens:,} tokens, two passes (GradCache) if more than one"
    num_chunks = -(-run.most_items // run.chunking.rows)
    if num_chunks == 1:
        return "one chunk, one pass"
    return f"up to {num_chunks} chunks of {run.chunking.rows} items, two passes (GradCache) if more than one"


def _parameter_gathers(run: ResolvedRun) -> str:
    """Of ZeRO-3 they follow from DeepSpeed's order of fetching, so they are measured
    (launcher/run/parameter_gathers.py)."""
    return (
        "1 per step: the updated parameters"
        if run.zero_stage < 3
        else "logged after the second step of this start"
    )
