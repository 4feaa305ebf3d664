"""A release folder: everything needed to use a trained model, and vectors that prove it was loaded rightly.

<release>/backbone/            weights, configuration, tokenizer and image processor as Hugging Face has them
          prompts.safetensors  the soft tokens
          agff_config.json     the contract: prompts, limits, fusion, versions, where it came from
          golden.safetensors   embeddings of built-in items, checked at every load
          README.md            the model card
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from agff.backbone import load_backbone
from agff.batch import IMAGE_PLACEHOLDER, Item
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError
from agff.item_text import TextRule
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig

CONTRACT_FILE = "agff_config.json"
FORMAT = 3
GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of a vector's component: another machine's arithmetic stays below, another model does
not."""


def save_release(embedder: Embedder, folder: Path, *, origin: Mapping[str, Any]) -> Any:
    """Write a release and return the backbone that was written: unwrapped, adapters merged. The embedder is
    used up by it.

    origin: JSON values that say where the weights come from (run, step, backbone).
    """
    model, processor = embedder.model, embedder.processor
    folder.mkdir(parents=True)
    golden = embedder.encode(golden_items())
    save_file(
        {"vectors": model.prompted_embedding.vectors.detach().cpu().clone()}, folder / "prompts.safetensors"
    )
    save_file({"embeddings": golden}, folder / "golden.safetensors")
    backbone = plain_backbone(model)
    backbone.save_pretrained(folder / "backbone")
    processor.save(folder / "backbone")
    contract = {
        "format": FORMAT,
        "prompts": dataclasses.asdict(processor.prompts),
        "processor": dataclasses.asdict(processor.limits),
        "fusion": dataclasses.asdict(embedder.fusion),
        "texts": dataclasses.asdict(embedder.texts),
        "pooling": "last soft token of each prompt block, L2-normalised",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "origin": dict(origin),
    }
    (folder / "README.md").write_text(_model_card(contract))
    (folder / CONTRACT_FILE).write_text(json.dumps(contract, indent=2) + "\n")
    return backbone


def load(folder: str | Path, *, device: str | torch.device = "cpu", check: bool = True) -> Embedder:
    """The model of a release folder, ready for `.encode(items)` and `.similarity(a, b)`. Needs no DeepSpeed.

    check: encode the built-in items and compare them with the release's golden vectors.
    Raises CheckpointError when the folder is no release, is incomplete or does not reproduce its golden
    vectors.
    """
    folder = Path(folder)
    contract = _read_contract(folder)
    prompts, limits = PromptConfig(**contract["prompts"]), ProcessorConfig(**contract["processor"])
    dtype = getattr(torch, contract["dtype"])
    model = EmbeddingModel(load_backbone(folder / "backbone", dtype=dtype, attention="sdpa"), prompts)
    model.prompted_embedding.vectors.data.copy_(load_file(folder / "prompts.safetensors")["vectors"])
    processor = ItemProcessor.from_folder(folder / "backbone", prompts=prompts, limits=limits)
    fusion, texts = FusionConfig(**contract["fusion"]), TextRule(**contract["texts"])
    embedder = Embedder(model.to(device), processor, fusion, texts=texts)
    if check:
        check_golden(
            embedder, load_file(folder / "golden.safetensors")["embeddings"], contract["dtype"], folder
        )
    return embedder


def check_golden(embedder: Embedder, golden: Tensor, dtype: str, folder: Path) -> float:
    """Largest difference between the golden vectors and what the embedder makes of the same items now.

    Raises CheckpointError when it exceeds GOLDEN_TOLERANCE.
    """
    difference = (embedder.encode(golden_items()) - golden).abs().max().item()
    if not difference <= GOLDEN_TOLERANCE[dtype]:
        raise CheckpointError(
            f"{folder}: the loaded model differs from its golden vectors by {difference:.2g}, "
            f"allowed {GOLDEN_TOLERANCE[dtype]:.2g} in {dtype}; weights, tokenizer or image processor are "
            "not the released ones. Convert the checkpoint again, or pass check=False to look at it all the "
            "same"
        )
    return difference


def golden_items() -> list[Item]:
    """A text, an image and both: drawn by this function, so that every machine has the same."""
    image = Image.new("RGB", (56, 84))
    image.putdata([(x * 4 % 256, y * 3 % 256, x * y % 256) for y in range(84) for x in range(56)])
    return [
        Item(text="a red heart"),
        Item(text=f"{IMAGE_PLACEHOLDER}\nRepresent the given image.\n", image=image),
        Item(text=f"{IMAGE_PLACEHOLDER}\nWhat is in the picture?\n", image=image),
    ]


def plain_backbone(model: EmbeddingModel) -> Any:
    """The backbone with its own embedding and merged adapters, key names as transformers knows them."""
    backbone = model.backbone
    backbone.set_input_embeddings(model.prompted_embedding.base)
    return backbone.merge_and_unload() if hasattr(backbone, "merge_and_unload") else backbone


def _read_contract(folder: Path) -> dict[str, Any]:
    path = folder / CONTRACT_FILE
    try:
        contract = json.loads(path.read_text())
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder}: no release here ({CONTRACT_FILE} is missing or unreadable); "
            "make one with launcher/convert_checkpoint.py RUN OUT"
        ) from None
    if contract.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {contract.get('format')} is not {FORMAT}, the one this version reads"
        )
    for name in ("backbone", "prompts.safetensors", "golden.safetensors"):
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder / name} is missing; the release is incomplete: convert the checkpoint again"
            )
    return contract


def _model_card(contract: Mapping[str, Any]) -> str:
    facts = "\n".join(f"| {name} | {value} |" for name, value in contract["origin"].items())
    num_fine = contract["prompts"]["num_fine"]
    return f"""# A multimodal embedding model

Trained with AGFF-Embed and EGA: one global and {num_fine} fine-grained vectors per item, compared by a
log-sum-exp of four global/fine similarities (beta {contract["fusion"]["beta"]}).

    import agff
    model = agff.load("this folder")
    a = model.encode(["a red heart"])
    b = model.encode([{{"image": "picture.jpg", "text": "Represent the given image."}}])
    model.similarity(a, b)

| origin | |
|---|---|
{facts}

Scores stand in scores.json once launcher/evaluate.py has been run on this folder.
"""
