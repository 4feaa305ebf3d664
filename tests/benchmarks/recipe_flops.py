"""What a step of a recipe computes at real widths, beside what it must: by formula, without weights.

The lengths are like MMEB-train's: kinds of pairs and sizes of images as its subsets have them, chosen by us,
not measured. `python -m tests.benchmarks.recipe_flops` prints a line for each recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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

RECIPES = Path(__file__).parents[2] / "launcher/recipes"
NUM_RANKS = 8
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Kind:
    """Pairs of one kind of MMEB's subsets; numbers of tokens are (least, most)."""

    num_subsets: int
    query_image: Size | None
    query_tokens: tuple[int, int]
    target_image: Size | None
    target_tokens: tuple[int, int]


KINDS = (
    Kind(5, (500, 375), (10, 30), None, (2, 8)),  # an image to its class
    Kind(5, (640, 480), (15, 40), None, (2, 8)),  # a question on a photo
    Kind(3, (1700, 2200), (15, 40), None, (2, 10)),  # on a document, a chart
    Kind(2, (640, 480), (10, 20), None, (12, 40)),  # an image to its caption
    Kind(3, None, (20, 90), (640, 480), (8, 20)),  # a caption, a dialogue to its image
    Kind(2, (640, 480), (15, 40), (640, 480), (8, 20)),  # an image and a change to an image
)


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
class Row:
    """An item as the backbone sees it."""

    length: int
    image: Image | None


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

    def row(self, size: Size | None, num_text_tokens: int) -> Row:
        """An item."""
        image, num_image_tokens = self.image(size) if size else (None, 0)
        around = sum(map(len, self._family.around_image)) if size else 0
        room = self._processor.max_tokens - num_image_tokens - around - self._num_soft_tokens
        return Row(num_image_tokens + around + min(num_text_tokens, room) + self._num_soft_tokens, image)

    def blank(self) -> Image:
        """The image of a chunk of texts."""
        side = self._family.blank_image_size
        return self.image((side, side))[0]


def pairs(config: RunConfig, sizes: Sizes, *, seed: int) -> list[tuple[Row, Row]]:
    """A global batch: sub-batches in turn from one subset, three quarters of the images landscape."""
    generator = np.random.default_rng(seed)
    weights = np.array([kind.num_subsets for kind in KINDS]) / sum(kind.num_subsets for kind in KINDS)

    def row(size: Size | None, tokens: tuple[int, int]) -> Row:
        if size is not None:
            scale = generator.uniform(0.8, 1.0, size=2)
            size = (int(size[0] * scale[0]), int(size[1] * scale[1]))
            size = size if generator.random() < 0.75 else (size[1], size[0])
        return sizes.row(size, int(generator.integers(tokens[0], tokens[1] + 1)))

    rows = []
    for _ in range(config.batch.global_batch_size // config.data.sub_batch_size):
        kind = KINDS[generator.choice(len(KINDS), p=weights)]
        rows += [
            (row(kind.query_image, kind.query_tokens), row(kind.target_image, kind.target_tokens))
            for _ in range(config.data.sub_batch_size)
        ]
    return rows


def chunk_shapes(rows: list[Row], num_rows: int, blank: Image) -> Iterator[ChunkShape]:
    """The rows in chunks, as the loader cuts them."""
    for indices in FixedRows(rows=num_rows).cut([row.length for row in rows]):
        part = [rows[index] for index in indices]
        images = {id(row): row.image for row in part if row.image is not None} or {0: blank}
        yield ChunkShape(
            num_rows=len(part),
            padded_length=max(row.length for row in part),
            lengths=tuple(row.length for row in part),
            images=tuple(images.values()),
            image_ids=tuple(images),
            has_real_images=0 not in images,
        )


def step_of_recipe(
    config: RunConfig, *, chunk_size: int, num_ranks: int = NUM_RANKS, seed: int = 0
) -> list[StepFlops]:
    """A step of each rank, which takes every `num_ranks`-th pair of the global batch.

    Executed and needed FLOPs, F_v and F_l are in it; the sum over ranks is the step's.
    """
    model_config = published_config(Path(config.backbone.path).name)
    flops = ModelFlops.of_config(
        model_config,
        config.backbone,
        config.prompts,
        keeps_vision=True,
        first_pass_chunks=config.batch.first_pass_chunks,
    )
    sizes = Sizes(config, model_config, flops)
    batch = pairs(config, sizes, seed=seed)
    return [
        flops.step(
            list(
                chunk_shapes(
                    [row for pair in batch[rank::num_ranks] for row in pair], chunk_size, sizes.blank()
                )
            )
        )
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


def main() -> None:
    for path in sorted(RECIPES.glob("mmeb_*.yaml")):
        recipe = read_recipe(path)
        for checkpointing in (False, True):
            config = replace(recipe, backbone=replace(recipe.backbone, gradient_checkpointing=checkpointing))
            ranks = step_of_recipe(config, chunk_size=8)
            executed, needed, useful, vision, language = (
                sum(getattr(rank, part) for rank in ranks) / 1e15
                for part in ("executed", "needed", "useful", "vision_forward", "language_forward")
            )
            limit = sum(bound(config, rank) for rank in ranks) / 1e15
            num_padded = sum(rank.num_padded_tokens for rank in ranks)
            print(
                f"{path.stem}, checkpointing {'on' if checkpointing else 'off'}: PFLOP of a step: executed "
                f"{executed:.2f}, needed {needed:.2f}, useful {useful:.2f}, bound {limit:.2f}, "
                f"F_v {vision:.2f}, F_l {language:.2f}; executed / needed {executed / needed:.3f}, / bound "
                f"{executed / limit:.3f}; padding {1 - sum(r.num_tokens for r in ranks) / num_padded:.1%}"
            )


if __name__ == "__main__":
    main()
