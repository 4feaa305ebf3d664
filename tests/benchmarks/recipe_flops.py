"""What a step of a recipe computes at real widths, beside what it must: by formula, without weights, on
lengths like MMEB's (tests/mmeb_like.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlavaOnevisionConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from agff.families import family_of
from agff.flops import ChunkShape, ModelFlops, StepFlops
from agff.vision_flops import Image, LlavaVisionFlops
from data_pipeline.collate import FixedRows
from launcher.run.config import RunConfig
from launcher.run.config_file import read_recipe
from tests.benchmarks.table import Row
from tests.mmeb_like import SUBSETS, Length, Size

RECIPES = Path(__file__).parents[2] / "launcher/recipes"
NUM_RANKS = 8
ROWS_OF_AUTO = 8
"""Rows of a chunk where the recipe leaves them to the machine."""
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mmeb_qwen2vl_2b", {}),
    ("mmeb_qwen2vl_2b", {"lora": None}),
    ("mmeb_llava_ov_7b", {}),
)
"""Recipe, and what of its backbone is chosen otherwise."""
WITH = {False: "without", True: "with"}


def published_config(name: str) -> Any:
    """config.json of the published model of that folder name, as far as it decides FLOPs."""
    if name == "Qwen2-VL-2B-Instruct":
        return Qwen2VLConfig(
            text_config={
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [16, 24, 24],
                },
            },
            vision_config={
                "depth": 32,
                "embed_dim": 1280,
                "hidden_size": 1536,
                "num_heads": 16,
                "mlp_ratio": 4,
                "patch_size": 14,
            },
        )
    assert name == "llava-onevision-qwen2-7b-ov-hf", f"the numbers of {name} are not known here"
    sides = range(384, 2305, 384)
    return LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152128,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
    )


@dataclass(frozen=True)
class ItemRow:
    """An item as the backbone sees it."""

    length: int
    image: Image | None
    content: tuple[Any, ...]
    """Equal items have equal ones."""


class Sizes:
    """Rows of a recipe's model from sizes of images and numbers of text tokens."""

    def __init__(self, config: RunConfig, model_config: Any, flops: ModelFlops) -> None:
        self._processor, self._num_soft_tokens = config.processor, config.prompts.num_tokens
        self._limits = {name: getattr(config.processor, name) for name in ("min_pixels", "max_pixels")}
        self._family, self._vision, self._model_config = (
            family_of(model_config),
            flops.run.vision,
            model_config,
        )

    def image(self, size: Size) -> tuple[Image, int]:
        """What the tower sees of it, and its tokens."""
        width, height = size
        if isinstance(self._vision, LlavaVisionFlops):
            return self._vision.image(height, width), self._family.num_tokens_of_size(height, width, None)
        vision = self._model_config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        height, width = smart_resize(height, width, factor=factor, **self._limits)
        grid = (1, height // vision.patch_size, width // vision.patch_size)
        return (grid,), grid[1] * grid[2] // vision.spatial_merge_size**2

    def row(self, item: Length, *of: Any) -> ItemRow:
        """An item of a side of a subset."""
        image, num_image_tokens = self.image(item.image) if item.image else (None, 0)
        around = sum(map(len, self._family.around_image)) if item.image else 0
        room = self._processor.max_tokens - num_image_tokens - around - self._num_soft_tokens
        length = num_image_tokens + around + min(item.num_text_tokens, room) + self._num_soft_tokens
        return ItemRow(length, image, (*of, item.content))

    def blank(self) -> Image:
        """The image of a chunk of texts."""
        side = self._family.blank_image_size
        return self.image((side, side))[0]


def pairs(config: RunConfig, sizes: Sizes, *, seed: int) -> list[tuple[ItemRow, ItemRow]]:
    """A global batch: sub-batches in turn, each from one subset."""
    generator, size = np.random.default_rng(seed), config.data.sub_batch_size
    names = list(SUBSETS)
    found = []
    for _ in range(config.batch.global_batch_size // size):
        name = names[generator.integers(len(names))]
        sides = [
            [sizes.row(item, name, side) for item in drawn.draw(generator, size)]
            for side, drawn in enumerate(SUBSETS[name])
        ]
        found += list(zip(*sides, strict=True))
    return found


def chunk_shapes(rows: Iterable[ItemRow], num_rows: int, blank: Image) -> Iterator[ChunkShape]:
    """The different rows in chunks, as the loader cuts them."""
    different = list({row.content: row for row in rows}.values())
    for indices in FixedRows(rows=num_rows).cut([row.length for row in different]):
        part = [different[index] for index in indices]
        images = {id(row): row.image for row in part if row.image is not None} or {0: blank}
        yield ChunkShape(
            num_rows=len(part),
            padded_length=max(row.length for row in part),
            lengths=tuple(row.length for row in part),
            images=tuple(images.values()),
            image_ids=tuple(images),
            has_real_images=0 not in images,
        )


def step_of_recipe(config: RunConfig, *, num_ranks: int = NUM_RANKS, seed: int = 0) -> list[StepFlops]:
    """A step of each rank, which takes every `num_ranks`-th pair of the global batch.

    Executed and needed FLOPs, F_v and F_l are in it; the sum over ranks is the step's.
    """
    model_config = published_config(Path(config.backbone.path).name)
    flops = ModelFlops.of_config(
        model_config,
        config.backbone,
        config.prompts,
        keeps_vision=config.batch.keep_vision != "off",
        first_pass_chunks=config.batch.first_pass_chunks,
    )
    sizes = Sizes(config, model_config, flops)
    batch = pairs(config, sizes, seed=seed)
    num_rows = config.batch.chunk_size if isinstance(config.batch.chunk_size, int) else ROWS_OF_AUTO
    return [
        flops.step(list(chunk_shapes(chain(*batch[rank::num_ranks]), num_rows, sizes.blank())))
        for rank in range(num_ranks)
    ]


def bound(config: RunConfig, step: StepFlops) -> int:
    """Two passes of the plain model over real tokens and images.

    F_v + 3 F_l with LoRA, whose tower is frozen; 4 (F_v + F_l) with full tuning, 5 where checkpointing
    computes everything once more; of a frozen tower F_v once.
    """
    backbone = config.backbone
    if backbone.lora is not None:
        return step.vision_forward + 3 * step.language_forward
    times = 5 if backbone.gradient_checkpointing else 4
    return (1 if backbone.freeze_vision else times) * step.vision_forward + times * step.language_forward


def variant(recipe: str, choices: Mapping[str, Any], *, checkpointing: bool) -> RunConfig:
    """The recipe with another backbone."""
    config = read_recipe(RECIPES / f"{recipe}.yaml")
    backbone = replace(config.backbone, gradient_checkpointing=checkpointing, **choices)
    return replace(config, backbone=backbone)


def flops_rows() -> list[Row]:
    """Of every variant, with and without gradient checkpointing: executed FLOPs beside the needed ones and
    beside the bound."""
    return [
        row
        for recipe, choices in VARIANTS
        for checkpointing in (False, True)
        for row in _rows(
            recipe + ", full tuning" * ("lora" in choices) + f", {WITH[checkpointing]} checkpointing",
            variant(recipe, choices, checkpointing=checkpointing),
        )
    ]


def _rows(case: str, config: RunConfig) -> list[Row]:
    ranks = step_of_recipe(config)
    executed, vision, language, num_tokens, num_padded = (
        sum(getattr(rank, part) for rank in ranks)
        for part in ("executed", "vision_forward", "language_forward", "num_tokens", "num_padded_tokens")
    )
    note = (
        f"{executed / 1e15:.2f} PFLOP, F_v {vision / 1e15:.2f}, F_l {language / 1e15:.2f}; "
        f"{1 - num_tokens / num_padded:.1%} of the tokens are padding"
    )
    others = {
        "needed ones": sum(rank.needed for rank in ranks),
        "two passes of the plain model": sum(bound(config, rank) for rank in ranks),
    }
    return [
        Row(
            group="flops",
            what=f"executed FLOPs of a step on {NUM_RANKS} ranks",
            case=case,
            against=against,
            quantity="FLOPs",
            ratio=executed / other,
            note=note,
        )
        for against, other in others.items()
    ]
