"""MM-GEM on the rows of tests/agff/tiny.py: each image learns to say its row's text backwards; some are
regions."""

from __future__ import annotations

from dataclasses import replace

import torch

from agff.batch import Batch, ModelInputs
from agff.objectives.mm_gem import MmGem
from agff.pooled_rows import BOX, CAPTION_LENGTH, CAPTION_START, ROW_IMAGE_IDS, ROW_KIND, RowKind
from agff.shared_images import IMAGE_IDS
from tests.agff.tiny import IMAGE_TOKEN, VOCABULARY

OBJECTIVE = MmGem(temperature=0.5, grid=2, region_grid=1, nested_dims=[8])
"""An image of tests/agff/tiny.py is one token, so each prefix is too."""
END = 29


def prepared(batch: Batch) -> Batch:
    """The batch with captions behind the prompts, and what the head reads. Rows without an image have none,
    so on two ranks the second has no caption."""
    return replace(batch, chunks=tuple(map(_pooled, batch.chunks)), filler=_pooled(batch.filler))


def _pooled(chunk: ModelInputs) -> ModelInputs:
    ids = chunk["input_ids"].tolist()
    starts = [max(place for place, token in enumerate(row) if token >= VOCABULARY) + 1 for row in ids]
    kinds, image_ids, captions = [], [], []
    # one id for each: of two rows with one image the gradients would meet before Qwen2-VL's vision attention,
    # which rounds them to float32 even here
    ids_U = chunk[IMAGE_IDS] + torch.arange(len(chunk[IMAGE_IDS]))
    images = iter(ids_U.tolist())
    for row, prompt_start in zip(ids, chunk["prompt_start_B"].tolist(), strict=True):
        has_image, text = row[0] == IMAGE_TOKEN, row[1:prompt_start]
        carries_blank = not has_image and IMAGE_TOKEN in row
        kind = RowKind.REGION if has_image and sum(text) % 2 else RowKind.IMAGE if has_image else RowKind.TEXT
        kinds.append(RowKind.BLANK if carries_blank else kind)
        image_ids.append(next(images) if has_image or carries_blank else 0)
        captions.append([*text[::-1], END] if has_image else [])
    widest = max(len(ids[0]), *(start + len(each) for start, each in zip(starts, captions, strict=True)))
    more = widest - len(ids[0])
    input_ids = torch.nn.functional.pad(chunk["input_ids"], (0, more))
    for row, (start, caption) in enumerate(zip(starts, captions, strict=True)):
        if caption:
            input_ids[row, start : start + len(caption)] = torch.tensor(caption)
    last = chunk["position_ids"][..., -1:]
    return {
        **chunk,
        "input_ids": input_ids,
        "position_ids": torch.cat([chunk["position_ids"], last + 1 + torch.arange(more)], dim=-1),
        IMAGE_IDS: ids_U,
        ROW_KIND: torch.tensor(kinds),
        ROW_IMAGE_IDS: torch.tensor(image_ids),
        BOX: torch.tensor([[0.0, 0.25, 0.5, 1.0]]).repeat(len(ids), 1),
        CAPTION_START: torch.tensor(starts),
        CAPTION_LENGTH: torch.tensor([len(caption) for caption in captions]),
    }
