"""The sets that are asked for, from their tables."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, TypeGuard

from tqdm import tqdm

from agff.collectives import rank
from agff.errors import ConfigError, DataError
from data_pipeline.layouts.caption_folders import find_caption_sets
from data_pipeline.layouts.caption_set import CaptionSet, ReferenceSet, reference_set
from data_pipeline.layouts.eval_items import EmbeddedImage, refuse_all
from data_pipeline.layouts.mmeb_eval import EvalSet, read_eval_set
from data_pipeline.layouts.mmeb_sets import find_eval_sets
from data_pipeline.layouts.mmvp import MmvpSet, read_mmvp
from data_pipeline.layouts.region_set import RegionSet, find_region_sets, read_region_set
from data_pipeline.layouts.sugarcrepe import ChoiceSet

JudgedBenchmark: TypeAlias = CaptionSet | ChoiceSet | RegionSet | ReferenceSet
Benchmark: TypeAlias = EvalSet | MmvpSet | JudgedBenchmark


def read_benchmarks(
    *,
    mmeb_eval: Path | None,
    mmeb_images: Path | None,
    mmvp: Path | None,
    max_queries: int | None,
    captions: Path | None = None,
    caption_images: Path | None = None,
    regions: Path | None = None,
    caption_quality: Path | None = None,
) -> list[Benchmark]:
    """The sets under `mmeb_eval`, MMVP, those under `captions`, `regions`, `caption_quality`, in this order.

    caption_images: where the image files of `captions` and `caption_quality` are, beside their tables when
    None. Raises DataError with what is wrong with any of the tables.
    """
    for folder, option in ((mmeb_images, "--mmeb_images"), (caption_images, "--caption_images")):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder ({option})")
    readers: list[Callable[[], Benchmark]] = []
    if mmeb_eval is not None:
        readers += [
            functools.partial(
                read_eval_set, mmeb_eval, name, info, images_root=mmeb_images, max_queries=max_queries
            )
            for name, info in find_eval_sets(mmeb_eval).items()
        ]
    if mmvp is not None:
        readers.append(functools.partial(read_mmvp, mmvp))
    if captions is not None:
        readers += find_caption_sets(captions, images_root=caption_images, option="--captions")
    if regions is not None:
        readers += [functools.partial(read_region_set, source) for source in find_region_sets(regions)]
    if caption_quality is not None:
        found = find_caption_sets(caption_quality, images_root=caption_images, option="--caption_quality")
        readers += [functools.partial(_references, read) for read in found]
    benchmarks, findings = [], []
    for read in tqdm(readers, desc="read tables", unit="set", file=sys.stderr, disable=rank() > 0):
        try:
            benchmarks.append(read())
        except DataError as error:
            findings.append(str(error))
    refuse_all(findings, remedy="")
    refuse_all(_twice(benchmarks), remedy="Scores are kept by name: name the folders apart.")
    return benchmarks


def text_to_image_set(benchmarks: Sequence[Benchmark]) -> EvalSet | CaptionSet | None:
    """The first set of texts with images as candidates."""
    return next(filter(_is_text_to_image, benchmarks), None)


def content_hash(benchmark: Benchmark) -> str:
    """Of what the tables say, the images that are in them, the places of the others, and what is wrong with
    them."""
    digest = hashlib.sha256(repr(benchmark).encode(errors="surrogatepass"))
    for item in benchmark.items:
        if isinstance(item.image, EmbeddedImage):  # the bytes are not in its words
            digest.update(item.image.content)
    return digest.hexdigest()


def _references(read: Callable[[], CaptionSet | ChoiceSet]) -> ReferenceSet:
    found = read()
    if isinstance(found, ChoiceSet):
        raise DataError(
            f"{found.name}: holds choices between two captions, not references (--caption_quality)"
        )
    return reference_set(found)


def _twice(benchmarks: Sequence[Benchmark]) -> list[str]:
    keys = Counter((type(benchmark), benchmark.name) for benchmark in benchmarks)
    return [f"{name}: {count} sets of this name" for (_, name), count in keys.items() if count > 1]


def _is_text_to_image(eval_set: Benchmark) -> TypeGuard[EvalSet | CaptionSet]:
    """No query has an image, every candidate has one."""
    if not isinstance(eval_set, EvalSet):
        return isinstance(eval_set, CaptionSet)
    return all(eval_set.items[query].image is None for query in eval_set.queries) and all(
        eval_set.items[item].image is not None for row in eval_set.candidates for item in row
    )
