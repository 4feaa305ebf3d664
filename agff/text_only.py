"""Chunks of a run on texts alone: no image in any of them, on any rank, so that the vision tower is not
called."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agff.batch import Item, ModelInputs
from agff.errors import all_or_errors
from agff.processor import ItemProcessor
from agff.shared_images import IMAGE_IDS


class TextsAlone:
    """Callable: items -> ModelInputs (`agff.batch.ProcessItems`), those of an ItemProcessor without its blank
    image: no tensor of an image is left but an empty IMAGE_IDS, and what was behind the prompts is padding.

    For training with `BackboneConfig.text_only`; whoever uses the model takes the ItemProcessor itself.
    """

    def __init__(self, processor: ItemProcessor) -> None:
        self._processor = processor

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        """Inputs of the items as the rows of one chunk. Raises DataError, with a line for each, for items
        with an image, and what an ItemProcessor raises."""
        all_or_errors(_check, items)
        inputs = self._processor(items)
        family = self._processor.family
        length_B = inputs["prompt_start_B"] + self._processor.prompts.num_tokens
        width = int(length_B.max())
        is_row_BT = torch.arange(width) < length_B[:, None]
        kept = {
            name: tensor[..., :width] if name in ("input_ids", "position_ids") else tensor
            for name, tensor in inputs.items()
            if name not in {*family.image_inputs, *family.tower_inputs}
        }
        return {
            **kept,
            "input_ids": kept["input_ids"].masked_fill(~is_row_BT, 0),
            IMAGE_IDS: torch.zeros(0, dtype=torch.int64),
        }

    def num_tokens(self, item: Item) -> int:
        """Length of the item's row. Raises DataError for an item with an image."""
        _check(item)
        return self._processor.num_tokens(item)


def _check(item: Item) -> None:
    if item.image is not None:
        raise item.error(
            "has an image, and the run trains on texts alone (backbone.text_only: true); leave its source "
            "out (data.weights), or set backbone.text_only false"
        )
