"""What a step of a recipe computes at real widths, beside what it must, and what a rank holds in memory
(tests/benchmarks/recipe_memory.py): by formula, without weights, on lengths like those of the recipe's data
(tests/mmeb_like.py). `python -m tests.benchmarks.recipe_flops` prints both.

The ratios leave an objective's head out, as agff/flops.py does; the note says what it adds to the executed
ones (tests/benchmarks/recipe_heads.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from agff.families import family_of
from agff.flops import ChunkShape, ModelFlops, StepFlops
from agff.vision_flops import Image, LlavaVisionFlops
from data_pipeline.collate import FixedRows
from launcher.run.config import RunConfig
from launcher.run.config_file import read_recipe
from tests.benchmarks.published import RECIPES, model_of
from tests.benchmarks.recipe_heads import head_flops
from tests.benchmarks.table import Row
from tests.mmeb_like import REGIONS, SUBSETS_OF, Length, Size

NUM_RANKS = 8
ROWS_OF_AUTO = 8
"""Rows of a chunk where the recipe leaves them to the machine."""
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mmeb_qwen2vl_2b", {}),
    ("mmeb_qwen2vl_2b", {"lora": None}),
    ("mmeb_llava_ov_7b", {}),
)
"""Recipe, and what of its backbone is chosen otherwise."""
RELATIVES = (
    "unime_stage1",
    "unime_stage1_llava_ov_7b",
    "unime_stage2",
    "unime_stage2_llava_ov_7b",
    "fam_align",
    "fam_adapt",
    "mm_gem_stage1",
    "mm_gem_stage2",
)
"""Recipes of the other papers."""
RELATIVE = "relative's "
WITH = {False: "without", True: "with"}


@dataclass(frozen=True)
class ItemRow:
    """An item as the backbone sees it."""

    length: int
    image: Image | None
    content: tuple[Any, ...]
    """Equal items have equal ones."""
    caption: int = 0
    """Tokens of `length` that the item learns to say."""
    cells: int = 0
    """Pooled ones that the language model reads in place of the image's tokens."""


class Sizes:
    """Rows of a recipe's model from sizes of images and numbers of text tokens."""

    def __init__(self, config: RunConfig, model_config: Any, flops: ModelFlops) -> None:
        self._cells = config.loss.image_cells
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

    def pair(self, name: str, query: Length, target: Length) -> tuple[ItemRow, ItemRow]:
        """Of a subset; with pooled images, one beside a text learns to say it, and its end."""

        def row(side: int, item: Length, partner: Length) -> ItemRow:
            is_said = self._cells is not None and item.image and not partner.image
            caption = partner.num_text_tokens + 1 if is_said else 0
            return self._row(item, caption, name, side)

        return row(0, query, target), row(1, target, query)

    def _row(self, item: Length, caption: int, name: str, side: int) -> ItemRow:
        image, num_image_tokens = self.image(item.image) if item.image else (None, 0)
        cells = 0
        if self._cells is not None and image is not None:
            merge = self._model_config.vision_config.spatial_merge_size
            height, width = (length // merge for length in image[0][1:])
            rows, columns = self._cells.of_region if name == REGIONS else self._cells.of_image(height, width)
            num_image_tokens = cells = rows * columns
        around = sum(map(len, self._family.around_image)) if item.image else 0
        room = self._processor.max_tokens - num_image_tokens - around - self._num_soft_tokens - caption
        length = num_image_tokens + around + min(item.num_text_tokens, room) + self._num_soft_tokens + caption
        return ItemRow(length, image, (name, side, item.content), caption, cells)

    def blank(self) -> Image:
        """The image of a chunk of texts."""
        side = self._family.blank_image_size
        return self.image((side, side))[0]


def pairs(config: RunConfig, sizes: Sizes, *, seed: int) -> list[tuple[ItemRow, ItemRow]]:
    """A global batch: sub-batches in turn, each from one subset."""
    generator, size = np.random.default_rng(seed), config.data.sub_batch_size
    subsets = SUBSETS_OF[config.name]
    names = list(subsets)
    found = []
    for _ in range(config.batch.global_batch_size // size):
        name = names[generator.integers(len(names))]
        sides = [drawn.draw(generator, size) for drawn in subsets[name]]
        found += [sizes.pair(name, *pair) for pair in zip(*sides, strict=True)]
    return found


def chunks_of(rows: Iterable[ItemRow], num_rows: int) -> Iterator[list[ItemRow]]:
    """The different rows in chunks, as the loader cuts them."""
    different = list({row.content: row for row in rows}.values())
    for indices in FixedRows(rows=num_rows).cut([row.length for row in different]):
        yield [different[index] for index in indices]


def chunk_shape(part: Sequence[ItemRow], blank: Image | None) -> ChunkShape:
    """blank: the image of a chunk of texts; None in training on texts alone."""
    images = {id(row): row.image for row in part if row.image is not None}
    has_real_images = bool(images)
    if not images and blank is not None:
        images = {0: blank}
    return ChunkShape(
        num_rows=len(part),
        padded_length=max(row.length for row in part),
        lengths=tuple(row.length for row in part),
        images=tuple(images.values()),
        image_ids=tuple(images),
        has_real_images=has_real_images,
    )


@dataclass(frozen=True)
class RecipeStep:
    """A step of a recipe: of each rank, which takes every `num_ranks`-th pair of the global batch, its
    chunks."""

    flops: ModelFlops
    chunks: list[list[list[ItemRow]]]
    blank: Image | None

    @classmethod
    def of(cls, config: RunConfig, *, num_ranks: int = NUM_RANKS, seed: int = 0) -> RecipeStep:
        """With ROWS_OF_AUTO rows a chunk where the recipe leaves them to the machine."""
        model_config = model_of(config)
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
        return cls(
            flops=flops,
            chunks=[list(chunks_of(chain(*batch[rank::num_ranks]), num_rows)) for rank in range(num_ranks)],
            blank=None if config.backbone.text_only else sizes.blank(),
        )

    def shapes(self) -> list[list[ChunkShape]]:
        """Of each rank."""
        return [[chunk_shape(part, self.blank) for part in chunks] for chunks in self.chunks]


def step_of_recipe(config: RunConfig, *, num_ranks: int = NUM_RANKS, seed: int = 0) -> list[StepFlops]:
    """A step of each rank. Executed and needed FLOPs, F_v and F_l are in it; the sum over ranks is the
    step's."""
    step = RecipeStep.of(config, num_ranks=num_ranks, seed=seed)
    return [step.flops.step(shapes) for shapes in step.shapes()]


def heads_of_recipe(config: RunConfig) -> int:
    """Executed by the objective's head in a step, of all ranks: the second pass of every chunk, the first one
    of all but a rank's first."""
    total = 0
    for chunks in RecipeStep.of(config).chunks:
        for number, part in enumerate(chunks):
            flops = head_flops(config.loss, model_of(config), part)
            total += flops.forward * (number > 0) + flops.forward + flops.backward + flops.recomputed
    return total


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
    variants = (*VARIANTS, *((recipe, {}) for recipe in RELATIVES))
    return [
        row
        for recipe, choices in variants
        for checkpointing in (False, True)
        for row in _rows(
            recipe + ", full tuning" * ("lora" in choices) + f", {WITH[checkpointing]} checkpointing",
            variant(recipe, choices, checkpointing=checkpointing),
        )
    ]


def _rows(case: str, config: RunConfig) -> list[Row]:
    ranks, is_relative = step_of_recipe(config), config.name in RELATIVES
    executed, vision, language, num_tokens, num_padded = (
        sum(getattr(rank, part) for rank in ranks)
        for part in ("executed", "vision_forward", "language_forward", "num_tokens", "num_padded_tokens")
    )
    note = (
        f"{executed / 1e15:.2f} PFLOP, F_v {vision / 1e15:.2f}, F_l {language / 1e15:.2f}; "
        f"{1 - num_tokens / num_padded:.1%} of the tokens are padding"
        + (f"; the head adds {heads / executed:.1%}" if (heads := heads_of_recipe(config)) else "")
    )
    others = {
        "needed ones": sum(rank.needed for rank in ranks),
        "two passes of the plain model": sum(bound(config, rank) for rank in ranks),
    }
    return [
        Row(
            group="family" if is_relative else "flops",
            what=f"executed FLOPs of a {RELATIVE * is_relative}step on {NUM_RANKS} ranks",
            case=case,
            against=against,
            quantity="FLOPs",
            ratio=executed / other,
            note=note,
        )
        for against, other in others.items()
    ]


def main() -> None:
    """Print the rows of FLOPs and the table of memory."""
    from tests.benchmarks.recipe_memory import memory_table

    for row in flops_rows():
        sys.stdout.write(f"{row.case}: {row.ratio:.3f} x {row.against}; {row.note}\n")
    sys.stdout.write("\n" + memory_table() + "\n")


if __name__ == "__main__":
    main()
