"""A tiny release of each family, with weights of which every layer has its say, and items to try it on."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import Image

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.embedder import AnyItem, Embedder
from agff.embedding_model import EmbeddingModel
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
from tests.agff.family_folders import BUILDERS

PROMPTS = PromptConfig(num_fine=2, tokens_per_prompt=2)


def trained_embedder(family: str, folder: Path, *, lora: bool, prompts: PromptConfig = PROMPTS) -> Embedder:
    """Of a family, its backbone written into `folder`; with `lora`, adapters that are not zero."""
    BUILDERS[family](folder)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = EmbeddingModel(
            choose_trainable(
                load_backbone(folder, dtype=torch.float32, attention="sdpa"),
                BackboneConfig(path=str(folder), lora=LoraConfig(rank=2) if lora else None),
            ),
            prompts,
        )
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens.base" not in name:
            torch.nn.init.normal_(parameter, std=0.05 if name.endswith("embed_tokens.vectors") else 0.1)
    processor = ItemProcessor.from_folder(folder, prompts=prompts, limits=ProcessorConfig())
    return Embedder(model, processor, FusionConfig())


def drawing(width: int, height: int, seed: int) -> Image.Image:
    """Of colours that blend, of a size that is no multiple of a patch, so that resizing has its say."""
    noise = torch.randint(0, 256, (5, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def items() -> dict[str, AnyItem]:
    """What is encoded, by what it is."""
    return {
        "a text": "a red heart",
        "a text with blanks around it": "  Find a photo of a dog, \t ünïcode 日本\n",
        "an image": drawing(97, 61, seed=1),
        "an image with a text": {"image": drawing(50, 131, seed=2), "text": " What is in the picture?\n"},
        "an image in a complete text": {
            "image": drawing(77, 77, seed=3),
            "text": "see <|image_1|>, a drawing ",
        },
        "an image with a blank text": {"image": drawing(56, 84, seed=4), "text": " \n"},
    }
