"""Retrieval of regions by their phrases, and of phrases by their regions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agff.embedder import Embedder
from agff.errors import ConfigError
from agff.recall import RecallScore
from data_pipeline.boxes import Box
from data_pipeline.layouts.region_set import RegionSet
from launcher.evaluation.caption_scores import direction_score
from launcher.evaluation.scores import Encodes


def check_embeds_regions(model: Embedder) -> None:
    """Raise ConfigError for a model that embeds no part of an image."""
    if model.processor.cells is None:
        raise ConfigError(
            "--regions: this model embeds whole images only; name a model trained with `objective: mm_gem`"
        )


def encode_region_set(
    model: Embedder, regions: RegionSet, encode: Encodes
) -> tuple[dict[int | tuple[int, Box], Tensor], dict[int, str]]:
    """({phrase's item or (image, box): its (1, D) vector}, {item: why it has none}). Collective.

    Each phrase and each region is encoded once.
    """
    texts = list(dict.fromkeys(text for text, _ in regions.phrases))
    found = encode([regions.items[text] for text in texts], title=f"phrases of {regions.name}")
    parts = encode(
        [
            replace(regions.items[image], text=model.texts.image_alone, box=box)
            for image, box in regions.regions
        ],
        title=f"regions of {regions.name}",
    )
    refused = {texts[position]: reason for position, reason in found.refused.items()}
    refused |= {regions.regions[position][0]: reason for position, reason in parts.refused.items()}
    vectors: dict[int | tuple[int, Box], Tensor] = {}
    vectors.update(zip(texts, found.vectors[:, :1], strict=True))
    vectors.update(zip(regions.regions, parts.vectors[:, :1], strict=True))
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
