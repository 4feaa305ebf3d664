"""A small model from a folder, and items of every kind for it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from agff.backbone import load_backbone
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
from data_pipeline.layouts.eval_items import EvalItem
from tests.drawings import tiny_backbone

NUM_FINE = 2
IMAGE = "<|image_1|>\nLook.\n"


def load_tiny(folder: Path, *, seed: int = 0, max_tokens: int = 64) -> Embedder:
    """The model of a folder that `write_tiny` made, the same for the same seed."""
    torch.manual_seed(seed)
    prompts, backbone = PromptConfig(num_fine=NUM_FINE), folder / "backbone"
    model = EmbeddingModel(load_backbone(backbone, dtype=torch.float32, attention="sdpa"), prompts)
    torch.nn.init.normal_(model.prompted_embedding.vectors)
    limits = ProcessorConfig(max_tokens=max_tokens)
    processor = ItemProcessor.from_folder(backbone, prompts=prompts, limits=limits)
    return Embedder(model, processor, FusionConfig())


def write_tiny(folder: Path) -> Path:
    """The folder, with a backbone and with the images of `tiny_items` in it."""
    tiny_backbone(folder / "backbone")
    for number in range(9):
        Image.new("RGB", (28 + 28 * (number % 3), 56), (25 * number, 40, 90)).save(folder / f"{number}.png")
    return folder


def tiny_items(folder: Path) -> list[EvalItem]:
    """Texts of different lengths and images of different sizes, in turn."""
    return [
        item
        for number in range(9)
        for item in (
            EvalItem("a red heart " * (1 + number % 4) + str(number)),
            EvalItem(IMAGE, folder / f"{number}.png"),
        )
    ]
