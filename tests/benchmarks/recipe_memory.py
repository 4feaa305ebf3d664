"""What a rank of 8 holds in memory while a recipe trains, at real widths: by formula, without weights.

N parameters of which n train, W ranks, bf16 weights as `precision: auto` gives on a GPU. In bytes:

weights     2 N; under ZeRO-3 2 N / W, and those that are gathered, 2 x stage3_max_live_parameters at most
gradients   4 n / W, summed over the chunks in float32, and two buckets of those being reduced, 2 x 2 x
            reduce_bucket_size at most
optimizer   12 n / W: float32 weights and both moments of AdamW
a chunk     of t tokens, padding included, at L layers of width H whose matrices read and write E numbers a
            token: 2 t E L without checkpointing; 2 t (H L + E) with it, the layers' inputs and the one layer
            that is computed again

Not in it: the frozen vision tower's one layer at a time and its kept output, the logits of MM-GEM's captions
(LOGITS_AT_ONCE, 0.2 GB), the allocator's fragments, CUDA's own 1 GB. So it says whether a recipe can start;
the rows of a chunk are found by `chunk_size: auto` on the GPU. Nothing here was measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import AutoModel

from agff.backbone import choose_trainable
from agff.flops import LanguageFlops
from launcher.run.config import RunConfig
from tests.benchmarks.published import model_of
from tests.benchmarks.recipe_flops import NUM_RANKS, RELATIVES, ROWS_OF_AUTO, RecipeStep, variant
from tests.benchmarks.table import Row

GPU_BYTES = 80 * 10**9
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Of one rank. See above."""

    num_parameters: int
    num_trainable: int
    weights: int
    gradients: int
    optimizer: int
    chunk_tokens: int
    """Of the largest chunk of a step, padding included."""
    chunk: int
    chunk_checkpointed: int

    @property
    def left(self) -> int:
        """For chunks, and what is not counted."""
        return GPU_BYTES - self.weights - self.gradients - self.optimizer


def num_parameters(config: RunConfig) -> tuple[int, int]:
    """(all, trained ones) of backbone, soft tokens and head."""
    model_config = model_of(config)
    with torch.device("meta"):
        backbone = choose_trainable(AutoModel.from_config(model_config), config.backbone)
        head = config.loss.build_head(model_config)
    soft = config.prompts.num_tokens * model_config.get_text_config().hidden_size
    own = soft + sum(parameter.numel() for parameter in (head.parameters() if head else ()))
    parameters = list(backbone.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() for parameter in parameters) + own, trained + own


def rank_bytes(config: RunConfig, *, num_ranks: int = NUM_RANKS) -> RankBytes:
    """What the recipe's own DeepSpeed file makes of it."""
    values = json.loads((DS_CONFIGS / f"{config.deepspeed}.json").read_text(encoding="utf-8"))
    zero = DeepSpeedZeroConfig(**values["zero_optimization"])
    total, trained = num_parameters(config)
    weights = 2 * total
    if zero.stage == 3:
        weights = 2 * total // num_ranks + 2 * min(zero.max_live_parameters, total)
    step = RecipeStep.of(config, num_ranks=num_ranks)
    tokens = max(shape.num_rows * shape.padded_length for rank in step.shapes() for shape in rank)
    language: LanguageFlops = step.flops.run.language
    layer = 2 * tokens * sum(linear.inputs + linear.outputs for linear in language.block.linears)
    inputs = 2 * tokens * language.block.linears[0].inputs
    return RankBytes(
        num_parameters=total,
        num_trainable=trained,
        weights=weights,
        gradients=4 * trained // num_ranks + 2 * 2 * min(zero.reduce_bucket_size, trained),
        optimizer=12 * trained // num_ranks,
        chunk_tokens=tokens,
        chunk=layer * language.num_layers,
        chunk_checkpointed=inputs * language.num_layers + layer,
    )


def memory_rows() -> list[Row]:
    """Of each recipe of the other papers: what a rank holds with a checkpointed chunk, beside its GPU."""
    rows = []
    for recipe in RELATIVES:
        found = rank_bytes(variant(recipe, {}, checkpointing=True))
        parts = {name: getattr(found, name) / 1e9 for name in ("weights", "gradients", "optimizer")}
        parts[f"chunk of {ROWS_OF_AUTO} rows, checkpointed"] = found.chunk_checkpointed / 1e9
        rows.append(
            Row(
                group="family",
                what=f"memory of a rank of {NUM_RANKS} in a relative's recipe, by formula",
                case=recipe,
                against=f"a GPU's {GPU_BYTES // 10**9} GB",
                quantity="bytes",
                ratio=sum(parts.values()) * 1e9 / GPU_BYTES,
                note=", ".join(f"{name} {size:.2f} GB" for name, size in parts.items()),
            )
        )
    return rows


def memory_table() -> str:
    """Markdown, a line for each recipe of the other papers."""
    lines = [
        f"GB a rank of {NUM_RANKS} GPUs of {GPU_BYTES // 10**9} GB, by formula "
        f"(tests/benchmarks/recipe_memory.py); a chunk: its largest of {ROWS_OF_AUTO} rows in a step.",
        "",
        "| recipe | ZeRO | parameters, trained | weights | gradients | optimizer | left | tokens a chunk "
        "| activations, checkpointed | without |",
        "|" + "---|" * 10,
    ]
    for recipe in RELATIVES:
        config = variant(recipe, {}, checkpointing=True)
        found = rank_bytes(config)
        cells = [
            recipe,
            config.deepspeed,
            f"{found.num_parameters / 1e6:,.0f} M, {found.num_trainable / 1e6:,.1f} M",
            *(f"{size / 1e9:.2f}" for size in (found.weights, found.gradients, found.optimizer, found.left)),
            f"{found.chunk_tokens:,}",
            f"{found.chunk_checkpointed / 1e9:.2f}",
            f"{found.chunk / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
