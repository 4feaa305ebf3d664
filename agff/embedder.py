"""Using a trained model: items in, embeddings and fused similarities out. No DeepSpeed, no process group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from agff.batch import IMAGE_FORMATS, IMAGE_PLACEHOLDER, Item
from agff.embedding_model import EmbeddingModel
from agff.errors import DataError
from agff.processor import ItemProcessor
from agff.similarity import FusionConfig, fused_similarity

AnyItem = Item | str | Image.Image | Path | Mapping[str, Any]
"""A text, an image (PIL or path), or {"text": ..., "image": PIL or path} with either or both."""


class Embedder:
    """A model and the processor it was trained with. `agff.load` makes one from a release folder."""

    def __init__(self, model: EmbeddingModel, processor: ItemProcessor, fusion: FusionConfig) -> None:
        self.model = model.eval()
        self.processor = processor
        self.fusion = fusion

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.prompted_embedding.vectors.device

    @property
    def weights_sha256(self) -> str:
        """Hash of all weights, to tell whose scores these are."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(self, items: Sequence[AnyItem], *, batch_size: int = 32, progress: bool = False) -> Tensor:
        """(N, 1 + K, D) float32 unit embeddings on the CPU; index 0 is the global one.

        An image whose text does not say where it belongs (`<|image_1|>`) stands before the text, as in MMEB.
        Raises DataError for an item that is none of AnyItem or an image that cannot be read.
        """
        chunks = []
        starts = range(0, len(items), batch_size)
        for start in tqdm(starts, desc="encode", unit="batch", disable=not progress):
            inputs = self.processor([as_item(item) for item in items[start : start + batch_size]])
            with torch.inference_mode():
                moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
                chunks.append(self.model(moved).cpu())
        if not chunks:
            return torch.empty(
                0, self.model.prompts.num_vectors, self.model.prompted_embedding.vectors.shape[1]
            )
        return torch.cat(chunks)

    def similarity(self, a_NMD: Tensor, b_CMD: Tensor) -> Tensor:
        """(N, C) fused similarity of two sets of embeddings, in [-1, 1], with the beta of the training
        run."""
        return fused_similarity(a_NMD, b_CMD, beta=self.fusion.beta)


def as_item(value: AnyItem) -> Item:
    """What `encode` accepts, as an Item with an open RGB image and the placeholder in place."""
    if isinstance(value, Item):
        return value
    if isinstance(value, Mapping):
        unknown = set(value) - {"text", "image"}
        if unknown:
            raise DataError(f"an item has the keys {sorted(unknown)}; known are text and image")
        text, image = value.get("text") or "", value.get("image")
    else:
        text, image = (value, None) if isinstance(value, str) else ("", value)
    if image is None:
        if not text:
            raise DataError("an item has neither text nor image")
        return Item(text=text)
    if IMAGE_PLACEHOLDER not in text:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    return Item(text=text, image=_open(image))


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, str | Path):
        raise DataError(f"an image is a path or a PIL image, found a {type(image).__name__}")
    try:
        with Image.open(image, formats=IMAGE_FORMATS) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{image}: cannot read the image: {error}") from None
