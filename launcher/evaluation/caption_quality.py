"""Captions that a model writes, judged by CIDEr-D beside the best of some constant captions."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from agff.cider import CiderD
from agff.collectives import gather_objects, rank, world_size
from agff.embedder import Embedder
from agff.errors import ConfigError, DataError
from data_pipeline.layouts.caption_set import ReferenceSet
from launcher.run.meeting import together

MAX_TOKENS = 64
"""Of a caption; greedy decoding."""
CONSTANT_CANDIDATES = 50
"""References that are tried as the constant caption, drawn evenly from the set."""


@dataclass(frozen=True, kw_only=True)
class CaptionQuality:
    """CIDEr-D (0 to 10) of a model's captions, and of the best of CONSTANT_CANDIDATES references when it is
    said of every image: what a model gets that knows the style and not the image."""

    num_images: int
    num_references: int
    cider_d: float
    constant_cider_d: float
    constant_caption: str
    max_tokens: int
    num_images_left_out: int = 0


def check_writes_captions(model: Embedder) -> None:
    """Raise ConfigError for a model that does not generate."""
    if model.processor.cells is None:
        raise ConfigError(
            "--caption_quality: this model only embeds, it writes no captions; name a model trained with "
            "`objective: mm_gem`"
        )


def captions_of(model: Embedder, images: ReferenceSet) -> tuple[dict[int, str], dict[int, str]]:
    """({image: what the model says of it}, {image: why it has no caption}), shared out over the ranks.
    Collective. One image is open at a time."""
    own = images.used[rank() :: world_size()]
    said, refused = together(lambda: _own_captions(model, images, own))
    every_said, every_refused = zip(*gather_objects((said, refused)), strict=True)
    return _joined(every_said), _joined(every_refused)


def _own_captions(
    model: Embedder, images: ReferenceSet, own: Sequence[int]
) -> tuple[dict[int, str], dict[int, str]]:
    said, refused = {}, {}
    for item in tqdm(
        own, desc=f"captions of {images.name}", unit="image", file=sys.stderr, disable=rank() > 0
    ):
        try:
            image = images.items[item].load({}).image
            assert image is not None, "a reference set is of images"
            [said[item]] = model.caption(image, max_tokens=MAX_TOKENS)
        except DataError as error:
            refused[item] = str(error)
    return said, refused


def _joined(parts: Sequence[dict[int, str]]) -> dict[int, str]:
    return dict(sorted(entry for part in parts for entry in part.items()))


def score_quality(images: ReferenceSet, said: dict[int, str]) -> CaptionQuality:
    """CIDEr-D of the captions of all images of the set, beside that of a constant one."""
    references = [texts for _, texts in images.references]
    judge = CiderD(references)
    scores = judge.scores([said[item] for item in images.used])
    constant, constant_score = best_constant(judge, references)
    return CaptionQuality(
        num_images=len(references),
        num_references=sum(map(len, references)),
        cider_d=math.fsum(scores) / len(scores),
        constant_cider_d=constant_score,
        constant_caption=constant,
        max_tokens=MAX_TOKENS,
        num_images_left_out=images.num_images_left_out,
    )


def best_constant(judge: CiderD, references: list[tuple[str, ...]]) -> tuple[str, float]:
    """(the caption, its score when said of every image): the best of CONSTANT_CANDIDATES references."""
    distinct = list(dict.fromkeys(text for texts in references for text in texts))
    count = min(CONSTANT_CANDIDATES, len(distinct))
    candidates = [distinct[index * len(distinct) // count] for index in range(count)]
    scores = {caption: judge.constant_score(caption) for caption in candidates}
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]
