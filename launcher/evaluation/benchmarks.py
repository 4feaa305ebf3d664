"""The sets that are asked for, from their tables."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from agff.errors import ConfigError, DataError
from data_pipeline.layouts.eval_items import refuse_all
from data_pipeline.layouts.mmeb_eval import EvalSet, read_eval_set
from data_pipeline.layouts.mmeb_sets import find_eval_sets
from data_pipeline.layouts.mmvp import MmvpSet, read_mmvp

Benchmark: TypeAlias = EvalSet | MmvpSet


def read_benchmarks(
    *, mmeb_eval: Path | None, mmeb_images: Path | None, mmvp: Path | None, max_queries: int | None
) -> list[Benchmark]:
    """The sets under `mmeb_eval`, then MMVP. Raises DataError with what is wrong with any of their tables."""
    readers: list[Callable[[], Benchmark]] = []
    if mmeb_eval is not None:
        if mmeb_images is not None and not mmeb_images.is_dir():
            raise ConfigError(f"{mmeb_images}: no such folder (--mmeb_images)")
        readers += [
            functools.partial(
                read_eval_set, mmeb_eval, name, info, images_root=mmeb_images, max_queries=max_queries
            )
            for name, info in find_eval_sets(mmeb_eval).items()
        ]
    if mmvp is not None:
        readers.append(functools.partial(read_mmvp, mmvp))
    benchmarks, findings = [], []
    for read in tqdm(readers, desc="read tables", unit="set", file=sys.stderr):
        try:
            benchmarks.append(read())
        except DataError as error:
            findings.append(str(error))
    refuse_all(findings, remedy="")
    return benchmarks


def text_to_image_set(benchmarks: Sequence[Benchmark]) -> EvalSet | None:
    """The first set of texts with images as candidates."""
    sets = (benchmark for benchmark in benchmarks if isinstance(benchmark, EvalSet))
    return next(filter(_is_text_to_image, sets), None)


def _is_text_to_image(eval_set: EvalSet) -> bool:
    """No query has an image, every candidate has one."""
    return all(eval_set.items[query].image is None for query in eval_set.queries) and all(
        eval_set.items[item].image is not None for row in eval_set.candidates for item in row
    )
