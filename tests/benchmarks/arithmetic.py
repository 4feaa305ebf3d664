"""Executed beside needed FLOPs of a step of each recipe, by formula at the published widths: no weights, no
pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from agff.families import family_of
from agff.flops import ChunkShape, ModelFlops
from agff.processor import ProcessorConfig
from agff.vision_flops import Image
from data_pipeline.collate import FixedRows
from launcher.quickstart.backbone import BackboneSizes
from launcher.run.config import RunConfig
from launcher.run.config_file import read_recipe
from tests.benchmarks.table import Row

RECIPES = Path(__file__).parents[2] / "launcher/recipes"
IMAGE_SIZES = ((640, 480), (500, 375), (480, 640), (336, 336), (1024, 768))
"""Width and height: photographs as in COCO and ImageNet, and a larger one."""
QWEN2_VL_2B = {
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
}
LLAVA_OV_7B = {
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
}
"""The vision tower is transformers' default: siglip-so400m-patch14-384."""
SIZES = BackboneSizes()
QUICKSTART = {
    "text_config": {
        "hidden_size": SIZES.hidden,
        "intermediate_size": SIZES.intermediate,
        "num_hidden_layers": SIZES.num_layers,
        "num_attention_heads": SIZES.num_heads,
        "num_key_value_heads": SIZES.num_kv_heads,
    },
    "vision_config": {
        "depth": SIZES.vision_layers,
        "embed_dim": SIZES.vision_hidden,
        "hidden_size": SIZES.hidden,
        "num_heads": SIZES.vision_heads,
    },
}
MODELS: dict[str, tuple[str, Mapping[str, Any], int]] = {
    "mmeb_qwen2vl_2b": ("qwen2_vl", QWEN2_VL_2B, 8),
    "mmeb_llava_ov_7b": ("llava_onevision", LLAVA_OV_7B, 8),
    "quickstart": ("qwen2_vl", QUICKSTART, 2),
}
"""Recipe -> model type, widths, ranks."""


@dataclass(frozen=True)
class Length:
    """All that is known of an item: its tokens, and the views of its image."""

    tokens: int
    image: Image | None


class KnownLengths:
    """Stands in for an item processor where only lengths are asked for."""

    def num_tokens(self, item: Length) -> int:
        return item.tokens

    def __call__(self, items: Sequence[Length]) -> Any:
        raise AssertionError("only lengths are asked for")


def arithmetic_rows() -> list[Row]:
    """Of one rank, on items like MMEB's."""
    return [_row(recipe, *model) for recipe, model in MODELS.items()]


def _row(recipe: str, model_type: str, values: Mapping[str, Any], num_ranks: int) -> Row:
    config = read_recipe(RECIPES / f"{recipe}.yaml")
    model_config = AutoConfig.for_model(model_type, **values)
    flops = ModelFlops.of_config(
        model_config, config.backbone, config.prompts, keeps_vision=False, first_pass_chunks=1
    )
    items = [
        _length(item, config, model_config, flops)
        for item in mmeb_like(2 * config.batch.global_batch_size // num_ranks)
    ]
    chunks = FixedRows(rows=config.batch.chunk_size or 8).cut(items, KnownLengths())
    blank = _length((family_of(model_config).blank_image_size,) * 2 + (0,), config, model_config, flops)
    step = flops.step([_shape([items[index] for index in chunk], blank) for chunk in chunks])
    padding = 1 - step.num_tokens / step.num_padded_tokens
    return Row(
        group="flops",
        what="executed FLOPs of a step",
        case=recipe,
        against="needed ones",
        quantity="FLOPs",
        ratio=step.executed / step.needed,
        note=f"{step.executed / 1e12:.3g} TFLOP on each of {num_ranks} ranks (F_v "
        f"{step.vision_forward / 1e12:.3g}, F_l {step.language_forward / 1e12:.3g}); {padding:.0%} of the "
        "tokens are padding",
    )


def mmeb_like(num_items: int) -> list[tuple[int, int, int]]:
    """(width, height, tokens of text) of queries, then of targets; 0, 0 where there is no image. Five queries
    in six and one target in three have one; a query's text holds an instruction."""
    generator = np.random.default_rng(0)
    drawn = []
    for number in range(num_items):
        is_query = number < num_items // 2
        has_image = generator.random() < (5 / 6 if is_query else 1 / 3)
        size = IMAGE_SIZES[generator.integers(len(IMAGE_SIZES))] if has_image else (0, 0)
        words = int(np.clip(generator.lognormal(2.2, 0.8), 1, 200))
        drawn.append((*size, words + (15 if is_query else 0)))
    return drawn


def _length(item: tuple[int, int, int], config: RunConfig, model_config: Any, flops: ModelFlops) -> Length:
    width, height, text = item
    if not width:
        return Length(text + config.prompts.num_tokens, None)
    if model_config.model_type == "llava_onevision":
        image = flops.run.vision.image(height, width)
        tokens = family_of(model_config).num_tokens_of_size(height, width, None)
    else:
        image = (_grid(height, width, config.processor, model_config.vision_config),)
        tokens = image[0][1] * image[0][2] // model_config.vision_config.spatial_merge_size**2
    return Length(tokens + text + config.prompts.num_tokens, image)


def _grid(height: int, width: int, limits: ProcessorConfig, vision: Any) -> tuple[int, int, int]:
    side = vision.patch_size * vision.spatial_merge_size
    least, most = limits.min_pixels or SIZES.min_pixels, limits.max_pixels or SIZES.max_pixels
    rows, columns = smart_resize(height, width, side, least, most)
    return 1, rows // vision.patch_size, columns // vision.patch_size


def _shape(items: Sequence[Length], blank: Length) -> ChunkShape:
    lengths = tuple(item.tokens for item in items)
    images = tuple(item.image for item in items if item.image is not None)
    return ChunkShape(
        num_rows=len(items),
        # a chunk of texts carries a blank image behind its shortest row
        padded_length=max(max(lengths), 0 if images else min(lengths) + blank.tokens),
        lengths=lengths,
        images=images or (blank.image or (),),
        image_ids=None,
        has_real_images=bool(images),
    )
