"""Using a trained model: items in, embeddings and fused similarities out. No DeepSpeed, no process group."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from agff.batch import MMEB_TEXTS, Item, ModelInputs, TextRule, text_problem, to_device
from agff.embedding_model import EmbeddingModel
from agff.errors import ConfigError, DataError, all_or_errors
from agff.images import open_image
from agff.nested import WHOLE_ONLY, Truncations
from agff.objectives.objective import Objective
from agff.processor import ItemProcessor
from agff.regions import Box, box_problem
from agff.similarity import FusionConfig, fused_similarity, fused_similarity_to_own

AnyItem = Item | str | Image.Image | Path | Mapping[str, Any]
"""A text, an image (PIL or path), or {"text": ..., "image": PIL or path} with either or both."""
ITEM_KINDS = "str (a text), Path or PIL image, or dict of text and image"


class Embedder:
    """A model and the processor it was trained with. `agff.load` makes one from a release folder."""

    def __init__(
        self,
        model: EmbeddingModel,
        processor: ItemProcessor,
        fusion: FusionConfig,
        *,
        texts: TextRule = MMEB_TEXTS,
        objective: Objective | None = None,
        truncations: Truncations = WHOLE_ONLY,
    ) -> None:
        """objective: that of the model's head, where it has one. truncations: what it was trained for beside
        whole items."""
        self.truncations = truncations
        self.objective = objective
        self.model = model.eval()
        self.processor = processor
        self.fusion = fusion
        self.texts = texts

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.prompted_embedding.vectors.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.prompted_embedding.vectors.dtype

    def read_in_bfloat16(self) -> None:
        """Round the weights to bfloat16, as a release in bfloat16 has them. Buffers stay: positions would
        lose their last digits."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    @property
    def weights_sha256(self) -> str:
        """Hash of all weights, to tell whose scores these are."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(
        self,
        items: AnyItem | Iterable[AnyItem],
        *,
        dim: int | None = None,
        num_fine: int | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Tensor:
        """(N, 1 + K, D) float32 unit embeddings on the CPU; index 0 is the global one.

        dim, num_fine: shorter ones, (N, 1 + num_fine, dim), again of unit length; only those that the model
        was trained for (`self.truncations`), else ValueError. Compare items of one kind of truncation only.

        items: a list, tuple, generator, array or column of items. One item is taken as a list of one: N is 1.
        A text alone is taken as it is, an image gets the text that `self.texts` says (agff/batch.py). By
        MMEB's rule that is `<|image_1|>`, a line break, the text or else "Represent the given image.", a line
        break; a text that holds `<|image_1|>` is complete. Beyond `max_tokens` a text loses its end.

        Raises DataError with a line for each item of a batch that cannot be used, as `items[3]: ...`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be >= 1")

        def cut(whole_NMD: Tensor) -> Tensor:
            return self.truncations.choose(dim, num_fine, like=whole_NMD.shape)(whole_NMD)

        numbered = enumerate(_items(items))
        chunks = []
        total = math.ceil(len(items) / batch_size) if isinstance(items, list | tuple) else None
        with tqdm(total=total, desc="encode", unit="batch", disable=not progress) as bar:
            while batch := list(itertools.islice(numbered, batch_size)):
                chunks.append(cut(self._encode_batch(batch)))
                bar.update()
        if not chunks:  # a head may make vectors of another width, which only a forward shows
            return cut(self._encode_batch([(0, Item(text=""))]))[:0].clone()
        return torch.cat(chunks)

    def _encode_batch(self, batch: Sequence[tuple[int, AnyItem]]) -> Tensor:
        def item(numbered: tuple[int, AnyItem]) -> Item:
            number, value = numbered
            return as_item(value, self.texts, address=f"items[{number}]")

        return self.encode_inputs(self.processor(all_or_errors(item, batch))).cpu()

    def encode_inputs(self, inputs: ModelInputs) -> Tensor:
        """(B, 1 + K, D) float32 unit embeddings, on the model's device, of what `self.processor` made of
        items."""
        with torch.inference_mode():
            return self.model(to_device(inputs, self.device))["embedding"]

    def encode_regions(self, image: AnyItem, boxes: Sequence[Box], *, batch_size: int = 32) -> Tensor:
        """(N, 1, D) float32 unit embeddings of regions of an image, on the CPU; that of the whole image is
        the image's. For a model that was trained with mm_gem.

        image: an item that `encode` takes, with an image. boxes: x0, y0, x1, y1 in its pixels. Raises
        DataError with a line for each box that is none, as `boxes[3]: ...`, ConfigError for another model.
        """
        return self.encode(self._regions(image, boxes), batch_size=batch_size)

    def caption(
        self,
        image: AnyItem,
        boxes: Sequence[Box] | None = None,
        *,
        max_tokens: int = 64,
        num_beams: int = 1,
        batch_size: int = 32,
    ) -> list[str]:
        """What the model says of each region of an image; without boxes, of the whole image alone, so one
        text. For a model that was trained with mm_gem.

        image, boxes, errors: as in `encode_regions`. max_tokens: of a caption, at most. num_beams: 1 takes
        the likeliest token at each step, more is a beam search.
        """
        from agff.captioning import generate  # with transformers' generation, which encoding does not need

        if min(max_tokens, num_beams, batch_size) < 1:
            raise ValueError(f"{max_tokens=}, {num_beams=}, {batch_size=} must be >= 1")
        items = self._regions(image, boxes)
        end_id, captions = self.processor.tokenizer.eos_token_id, []
        for start in range(0, len(items), batch_size):
            inputs = to_device(self.processor(items[start : start + batch_size]), self.device)
            with torch.inference_mode():
                captions += generate(
                    self.model, inputs, max_tokens=max_tokens, num_beams=num_beams, end_id=end_id
                )
        return [self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in captions]

    def _regions(self, image: AnyItem, boxes: Sequence[Box] | None) -> list[Item]:
        """An item for each box; without boxes, that of the whole image."""
        if self.processor.cells is None:
            raise ConfigError(
                "this model has neither regions nor captions, since its objective pools no images; train "
                "one with objective=mm_gem"
            )
        whole = replace(as_item(image, self.texts, address="image"), caption="")
        if whole.image is None:
            raise whole.error("has no image")
        if boxes is None:
            return [whole]
        width, height = whole.image.size

        def region(numbered: tuple[int, Box]) -> Item:
            number, box = numbered
            if problem := box_problem(box, width=width, height=height):
                raise DataError(f"boxes[{number}]: {problem}")
            return replace(whole, box=box)

        return all_or_errors(region, enumerate(map(_plain_box, boxes)))

    def similarity(self, a_NMD: Tensor, b_CMD: Tensor) -> Tensor:
        """(N, C) fused similarity of two sets of embeddings, in [-1, 1], with the beta of the training
        run."""
        return fused_similarity(a_NMD, b_CMD, beta=self.fusion.beta)

    def similarity_to_own(self, query_BMD: Tensor, own_BCMD: Tensor) -> Tensor:
        """(B, C) the same of each query and candidates of its own."""
        return fused_similarity_to_own(query_BMD, own_BCMD, beta=self.fusion.beta)


def as_item(value: AnyItem, texts: TextRule = MMEB_TEXTS, *, address: str = "") -> Item:
    """What `encode` accepts, as an Item: its image opened, its text complete by the rule. Raises DataError
    that starts with the address."""
    if isinstance(value, Item):
        address = value.address or address
        return replace(value, image=value.image and open_image(value.image, address), address=address)
    text: Any
    image: Any
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in ("text", "image")]:
            raise _error(address, f"unknown keys {unknown}; an item has text, image or both")
        text, image = value.get("text"), value.get("image")
    elif isinstance(value, str):
        text, image = value, None
    elif isinstance(value, Path | Image.Image):
        text, image = None, value
    else:
        raise _error(address, f"an item is a {ITEM_KINDS}, found {type(value).__name__} {value!r:.60}")
    if not isinstance(text, str | None):
        raise _error(address, text_problem(text, has_image=False) or "")
    if not isinstance(image, str | Path | Image.Image | None):
        raise _error(address, f"image must be a path or a PIL image, found {type(image).__name__}")
    if image is None:
        if not text:
            raise _error(address, "neither text nor image")
        return Item(text=str(text), address=address)
    if not isinstance(image, Image.Image):
        file = f"{image!s:.300}"  # somebody may give a whole image in base64
        address = f"{address}: {file}" if address else file
    return Item(text=texts.beside_image(text or ""), image=open_image(image, address), address=address)


def _plain_box(box: Any) -> Any:
    """Numbers of Python, also from an array; what is no list of them stays, to be named as what it is."""
    values = box.tolist() if hasattr(box, "tolist") else box
    return tuple(values) if isinstance(values, Sequence) else values


def _items(items: Any) -> Iterator[Any]:
    """The items one by one, whatever holds them."""
    if isinstance(items, str | Path | Image.Image | Mapping | Item):
        return iter([items])
    is_table = hasattr(items, "columns")  # iterating over one gives its columns or their names
    try:
        if not is_table and not isinstance(items, bytes | bytearray):
            return iter(items)
    except TypeError:
        pass
    remedy = "; a table becomes a list by .to_dict('records')" if is_table else ""
    raise DataError(f"give a list of items, each a {ITEM_KINDS}; found {type(items).__name__}{remedy}")


def _error(address: str, problem: str) -> DataError:
    return DataError(f"{address}: {problem}" if address else problem)
