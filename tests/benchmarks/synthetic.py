"""The model and the batches of the benchmarks: random weights, noise as images; nothing is fetched."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from agff.batch import IMAGE_PLACEHOLDER, Item
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.decode import Example
from launcher.quickstart.backbone import BackboneSizes, build_tiny_qwen2vl

SIZES = BackboneSizes(num_layers=4, vision_layers=4)
"""7.85 M parameters: the quickstart's widths with four layers in each tower."""
QUICK_SIZES = BackboneSizes(
    num_ranks=498, hidden=32, num_heads=2, num_kv_heads=1, intermediate=64, vision_hidden=32, vision_heads=2
)
PROMPTS = PromptConfig(num_fine=4)
LIMITS = ProcessorConfig(max_tokens=128)
SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sta", "vo", "pel")


def write_backbone(folder: Path, *, quick: bool) -> Path:
    """An ordinary Hugging Face folder with random weights; returns it."""
    build_tiny_qwen2vl(folder, seed=0, sizes=QUICK_SIZES if quick else SIZES)
    return folder


def processor_of(folder: Path, limits: ProcessorConfig = LIMITS) -> ItemProcessor:
    """The folder's, with K = 4."""
    return ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=limits)


@cache
def examples(num_pairs: int, *, image_side: int = 56, are_alike: bool = False) -> list[Example]:
    """Two pairs of an image with a question and a text, then two of a text and an image, and so on: every
    rank and every chunk has both.

    Texts have 2 to 12 words, every fifth image has twice the side of the others; are_alike: all have 7 words,
    all images one size. No two items and no two images are equal.
    """
    generator = np.random.default_rng(0)

    def text(number: int) -> str:
        count = 7 if are_alike else int(generator.integers(2, 13))
        return f"{number:0{5 * are_alike}d} " + " ".join(
            "".join(generator.choice(SYLLABLES, 2)) for _ in range(count)
        )

    def image(number: int) -> Item:
        side = image_side * (2 if number % 5 == 0 and not are_alike else 1)
        pixels = generator.integers(0, 256, size=(side, side, 3), dtype=np.uint8)
        return Item(text=f"{IMAGE_PLACEHOLDER}\n{text(number)}\n", image=Image.fromarray(pixels))

    pairs = []
    for number in range(num_pairs):
        with_image, alone = image(number), Item(text=text(number))
        query, target = (with_image, alone) if number // 2 % 2 == 0 else (alone, with_image)
        pairs.append(
            Example(
                query=query,
                target=target,
                query_id=2 * number,
                target_id=2 * number + 1,
                address=f"noise:{number}",
            )
        )
    return pairs
