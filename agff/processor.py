"""Items -> inputs of one chunk: image placeholder expanded, prompts appended, padded on the right.

A row is text and image, then the soft tokens, then the caption to learn, then padding. Attention is causal,
so nothing in use sees the padding, and there is no mask. The tensors, by what their first axis is:

    axis      tensor (shape)                     what
    row       input_ids (B, T)                   tokens; soft token i is id `vocabulary size + i`
    row       prompt_start_B (B,)                the first soft token; + their number: the row's length
    row       position_ids (B, 3, T)             Qwen: time, height, width of M-RoPE
    image     image_grid_thw (N, 3)              Qwen: patches in time (1), height, width; on the host
    image     image_lengths (N,)                 Qwen: patches, their product
    image     image_sizes (N, 2)                 LLaVA-OneVision: height, width in pixels; on the host
    patch     pixel_values (P, values)           Qwen: image by image, in blocks of merge x merge
    patch     image_position_ids (P, 2)          Qwen: height, width in the image
    patch     image_interp_indices (P, 4)        Qwen3-VL: entries of the table of positions
    patch     image_interp_weights (P, 4)        Qwen3-VL: their weights
    block     image_window_index (P / merge^2,)  Qwen2.5-VL: order by windows, from 0 on in each image
    window    window_lengths (W,)                Qwen2.5-VL: patches of each window of each image
    view      pixel_values (V, 3, side, side)    LLaVA-OneVision: the views of the images, without filling

and where a head pools the images (agff/pooled_rows.py):

    row       row_kind_B (B,)                    whether it is a text, an image, a region; on the host
    row       row_image_ids_B (B,)               content id of its image; on the host
    row       box_B4 (B, 4)                      its region, as shares of the image's width and height
    row       caption_start_B (B,)               behind the last soft token
    row       caption_length_B (B,)              tokens to learn there, the end of text included; on the host

Images are in the order of their rows, one in a row at most. So chunks are joined by `torch.cat` on the first
axis, after input_ids and position_ids were padded with 0 on their last, the tokens.

One processor serves training, evaluation and a loaded release, so that none of them can drift from the
others. It always uses the PIL image processors: with torchvision present or absent, the tensors are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from agff.batch import IMAGE_PLACEHOLDER, Item, ModelInputs
from agff.errors import ConfigError, DataError, all_or_errors
from agff.families import family_of
from agff.images import is_as_model_sees
from agff.pooled_rows import cells_of, check_fits_pooling, pooled_inputs, pooled_sizes, row_problem
from agff.prompts import PromptConfig
from agff.regions import ImageCells
from agff.shared_images import share


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """Limits on what one item may cost; a release carries them, so use has those of the training."""

    max_tokens: int = 512
    """Tokens of one item, image and prompts included; a longer text loses its end, an image is never cut."""
    min_pixels: int | None = None
    """Smaller images are enlarged, aspect ratio kept; None: the backbone's own limit."""
    max_pixels: int | None = None
    """Larger images are reduced, aspect ratio kept; None: the backbone's own limit."""

    def __post_init__(self) -> None:
        if self.max_tokens < 16:
            raise ConfigError(f"processor.max_tokens={self.max_tokens} must be >= 16")
        for name in ("min_pixels", "max_pixels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"processor.{name}={getattr(self, name)} must be >= 1, or null")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"processor.min_pixels={self.min_pixels} must be <= processor.max_pixels={self.max_pixels}"
            )


class ItemProcessor:
    """Callable: items -> ModelInputs (`agff.batch.ProcessItems`). Holds a tokenizer, an image processor, no
    weights."""

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        model_config: Any,
        prompts: PromptConfig,
        limits: ProcessorConfig,
        *,
        cells: ImageCells | None = None,
    ) -> None:
        """cells: how the model's head pools images (`Objective.image_cells`). Raises ConfigError for prompts
        that do not go with it."""
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.prompts, self.limits, self.cells = prompts, limits, cells
        self.family = family_of(model_config)
        self.image_token_id: int = model_config.image_token_id
        vocabulary_size = model_config.get_text_config().vocab_size
        self._prompt_ids = list(range(vocabulary_size, vocabulary_size + prompts.num_tokens))
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._before_image, self._after_image = (
            [self._special_id(token) for token in tokens] for tokens in self.family.around_image
        )
        if cells is not None:
            check_fits_pooling(prompts, tokenizer)
        self.family.set_pixel_limits(
            image_processor, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels
        )

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        prompts: PromptConfig,
        limits: ProcessorConfig,
        cells: ImageCells | None = None,
    ) -> ItemProcessor:
        """Read tokenizer and image processor of a backbone folder. Raises ConfigError when one is missing or
        unknown."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        try:
            return cls(
                AutoTokenizer.from_pretrained(folder, local_files_only=True),
                AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True),
                AutoConfig.from_pretrained(folder, local_files_only=True),
                prompts,
                limits,
                cells=cells,
            )
        except ConfigError:
            raise
        except Exception as error:  # of a damaged file the libraries raise whatever they stumble over
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ConfigError(
                f"{folder}: not a backbone folder with tokenizer and image processor: {reason}; download the "
                "folder again"
            ) from error

    def save(self, folder: Path) -> None:
        """Write tokenizer and image processor in their own formats; any transformers program reads them.
        Raises OSError where they cannot be written."""
        try:
            self.tokenizer.save_pretrained(folder)
        except Exception as error:
            if type(error) is not Exception:  # the plain one is all that the tokenizers library has
                raise
            raise OSError(f"{folder}: {error}") from None
        self.image_processor.save_pretrained(folder)

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        """Inputs of one chunk of rows.

        An image that several rows share is there once (agff/shared_images.py).
        There is always at least one image: a chunk of texts carries a small blank one behind the last prompt
        of its shortest row, where nothing attends to it, so that every rank calls the same modules under
        ZeRO-3 (exact: its gradient is zero).

        Raises DataError, with a line for each item and its address, for a text that holds the backbone's own
        image token, an image that needs more than `max_tokens` (with its caption, which is never cut) or that
        the image processor refuses, as one thinner than 1:200, or one that agff.images has not opened, and
        for a region or caption that cannot be (agff/pooled_rows.py).
        """
        images = all_or_errors(_image_as_model_sees, (item for item in items if item.image is not None))
        shared = share(images or [self._blank_image()])
        pixels = self._pixels(items, shared.unique)
        num_image_tokens = self.family.num_image_tokens(pixels)
        pooled = None
        if self.cells is not None:
            pooled = pooled_sizes(items, shared, self.family.map_sizes(pixels), self.cells)
        tokens_of_rows = (
            [rows * columns for rows, columns in pooled]
            if pooled
            else [num_image_tokens[place] for place in shared.index]
        )
        per_item = iter(tokens_of_rows)
        captions = [self._caption_ids(item) for item in items]
        rows = all_or_errors(
            lambda part: self._row(part[0], next(per_item) if part[0].image is not None else 0, part[1]),
            zip(items, captions, strict=True),
        )
        ends = [len(row) - len(caption) for row, caption in zip(rows, captions, strict=True)]
        shortest = min(range(len(rows)), key=lambda index: len(rows[index]))
        if not images:
            rows[shortest] = rows[shortest] + self._image_ids(tokens_of_rows[0])
        input_ids = torch.full((len(rows), max(map(len, rows))), self._pad_id)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row)
        is_image_BT = input_ids == self.image_token_id
        return {
            "input_ids": input_ids,
            "prompt_start_B": torch.tensor(ends) - self.prompts.num_tokens,
            **self.family.index(is_image_BT, pixels, shared.index, pooled=pooled),
            **(
                shared.inputs(num_image_tokens)
                if pooled is None
                else pooled_inputs(
                    items, shared, ends=ends, captions=list(map(len, captions)), blank=shortest
                )
            ),
        }

    def num_tokens(self, item: Item) -> int:
        """Length of the item's row (see `__call__`), from the size of its image and its text."""
        return len(self._row(item, self._num_image_tokens(item), self._caption_ids(item)))

    @property
    def max_image_pixels(self) -> int:
        """Pixels that the model sees of one image at most; more is lost when it is resized."""
        return self.family.max_image_pixels(self.image_processor)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a plain text. Special tokens spelled out in it are text too: content cannot steer the
        model."""
        # verbose: transformers would warn of a long text, which is cut afterwards
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids

    def _pixels(self, items: Sequence[Item], images: Sequence[Image.Image]) -> dict[str, Any]:
        """The image processor's tensors of the images, which are those of the items or a blank one."""
        try:
            return dict(self.image_processor(images=list(images), return_tensors="pt"))
        except ValueError as error:  # it cannot resize one of them and does not say which
            all_or_errors(self._num_image_tokens, items)
            raise DataError(f"the backbone's image processor refuses {len(images)} images: {error}") from None

    def _row(self, item: Item, num_image_tokens: int, caption_ids: list[int]) -> list[int]:
        if problem := row_problem(item, self.cells):
            raise item.error(problem)
        if self.family.image_token in item.text:
            raise item.error(
                f"text {item.text[:60]!r} holds the backbone's own image token {self.family.image_token}; "
                f"write {IMAGE_PLACEHOLDER} where the image belongs"
            )
        before, _, after = (
            item.text.partition(IMAGE_PLACEHOLDER) if item.image is not None else ("", "", item.text)
        )
        image_ids = self._image_ids(num_image_tokens) if item.image is not None else []
        room = self.limits.max_tokens - len(image_ids) - self.prompts.num_tokens - len(caption_ids)
        if room < 0:
            raise item.error(self._no_room(item, len(image_ids), len(caption_ids)))
        before_ids = self.tokenize(before)[:room]
        after_ids = self.tokenize(after)[: room - len(before_ids)]
        return before_ids + image_ids + after_ids + self._prompt_ids + caption_ids

    def _no_room(self, item: Item, num_image: int, num_caption: int) -> str:
        size = item.image.size if item.image else None
        parts = f"image of {size} pixels needs {num_image} tokens and the prompts {self.prompts.num_tokens}"
        if num_caption:  # not cut: the model would learn to stop there
            parts = f"{parts} and the caption, with its end, {num_caption}"
        lower = "lower processor.max_pixels or " if self.family.has_pixel_limits and not self.cells else ""
        return (
            f"{parts}, more than processor.max_tokens={self.limits.max_tokens}; {lower}raise "
            "processor.max_tokens"
        )

    def _caption_ids(self, item: Item) -> list[int]:
        """What the row learns to say behind its prompts, and to stop."""
        return [*self.tokenize(item.caption), self.tokenizer.eos_token_id] if item.caption else []

    def _num_image_tokens(self, item: Item) -> int:
        if item.image is None:
            return 0
        arguments = item.image.height, item.image.width, self.image_processor
        try:
            if self.cells is None:
                return self.family.num_tokens_of_size(*arguments)
            rows, columns = cells_of(item, self.family.map_size_of(*arguments), self.cells)
            return rows * columns
        except ValueError as error:
            raise item.error(f"the backbone's image processor refuses the image: {error}") from None

    def _image_ids(self, num_image_tokens: int) -> list[int]:
        return self._before_image + [self.image_token_id] * num_image_tokens + self._after_image

    def _special_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ConfigError(
                f"the tokenizer has no token {token}, which {self.family.name} puts around an image"
            )
        return token_id

    def _blank_image(self) -> Image.Image:
        return Image.new("RGB", (self.family.blank_image_size, self.family.blank_image_size))


def _image_as_model_sees(item: Item) -> Image.Image:
    image = item.image
    assert image is not None
    if not is_as_model_sees(image):
        raise item.error(
            f"the image has mode {image.mode}, a transparent colour or an orientation to apply; it must be "
            "opaque RGB and upright, as agff.images.open_image makes it"
        )
    return image
