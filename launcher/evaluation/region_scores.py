"""Retrieval of regions by their phrases, and of phrases by their regions."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from tqdm import tqdm

from agff.embedder import Embedder
from agff.errors import CheckpointError, ConfigError, DataError
from agff.recall import RecallScore
from data_pipeline.layouts.region_set import Box, RegionSet
from launcher.evaluation.caption_scores import direction_score
from launcher.evaluation.scores import encode_items, model_item


def check_embeds_regions(model: Embedder) -> None:
    """Raise ConfigError for a model that embeds no part of an image."""
    if model.processor.cells is None:
        raise ConfigError(
            "--regions: this model embeds whole images only; name a model trained with `objective: mm_gem`"
        )


def encode_region_set(
    model: Embedder, regions: RegionSet, *, batch_size: int
) -> tuple[dict[int | tuple[int, Box], Tensor], dict[int, str]]:
    """({phrase's item or (image, box): its (1, D) vector}, {item: why it has none}).

    Each phrase and each region is encoded once, each image opened once.
    """
    texts = list(dict.fromkeys(text for text, _ in regions.phrases))
    texts_NMD, late = encode_items(
        model, [regions.items[text] for text in texts], batch_size=batch_size, label=regions.name
    )
    refused = {texts[position]: reason for position, reason in late.items()}
    vectors: dict[int | tuple[int, Box], Tensor] = dict(zip(texts, texts_NMD[:, :1], strict=True))
    boxes_of: dict[int, list[Box]] = {}
    for image, box in regions.regions:
        boxes_of.setdefault(image, []).append(box)
    for image, boxes in tqdm(
        boxes_of.items(), desc=f"regions of {regions.name}", unit="image", file=sys.stderr
    ):
        try:
            opened = model_item(regions.items[image]).image
            assert opened is not None, "its box was compared with its size"
            regions_R1D = model.encode_regions(opened, boxes)
        except DataError as error:
            refused[image] = str(error)
            continue
        if not bool(regions_R1D.isfinite().all()):
            raise CheckpointError(f"{regions.name}: the model gives vectors of regions that are not finite")
        vectors.update(zip([(image, box) for box in boxes], regions_R1D.to(model.device), strict=True))
    return vectors, refused


def score_regions(
    model: Embedder, regions: RegionSet, vectors: dict[int | tuple[int, Box], Tensor]
) -> list[RecallScore]:
    """R@k of both directions by the global vectors.

    Ours: phrases and regions are compared within the whole set; right is every region that has the phrase,
    in its own words.
    """
    phrases = list(dict.fromkeys(text for text, _ in regions.phrases))
    rows = {text: row for row, text in enumerate(phrases)}
    first_region = len(phrases)
    keys: list[int | tuple[int, Box]] = [*phrases, *regions.regions]
    vectors_N1D = torch.stack([vectors[key] for key in keys])
    own_regions: list[set[int]] = [set() for _ in phrases]
    own_phrases: list[set[int]] = [set() for _ in regions.regions]
    for text, region in regions.phrases:
        own_regions[rows[text]].add(first_region + region)
        own_phrases[region].add(rows[text])
    phrase_rows, region_rows = range(first_region), range(first_region, len(keys))
    return [
        direction_score(
            model,
            vectors_N1D,
            queries=queries,
            candidates=candidates,
            own=own,
            direction=direction,
            similarity="global",
            num_left_out=num_left_out,
        )
        for queries, candidates, own, direction, num_left_out in (
            (phrase_rows, region_rows, own_regions, "phrase to region", regions.num_phrases_left_out),
            (region_rows, phrase_rows, own_phrases, "region to phrase", regions.num_regions_left_out),
        )
    ]
