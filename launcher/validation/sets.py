"""What a run is validated on, opened and looked at before the first step."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from agff.batch import Item
from agff.collectives import gather_objects, raise_together, rank, world_size
from agff.errors import AgffError, ConfigError, DataError
from agff.processor import ItemProcessor
from data_pipeline.layouts.eval_items import EmbeddedImage, refuse_all
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from launcher.evaluation.benchmarks import Benchmark, read_benchmarks
from launcher.evaluation.usable import Size, images_of, look, unreadable
from launcher.run.config import ResolvedRun, RunConfig
from launcher.run.data import RunData, check_shards_together
from launcher.validation.held_out import HeldOutData, open_held_out
from launcher.validation.scores import score_names

REMEDY = "Put these items right, or leave their set out of the section validation."


@dataclass(frozen=True, kw_only=True)
class ValidationSets:
    """Evaluation sets whose tables were read, and held-out shards whose manifest was."""

    benchmarks: tuple[Benchmark, ...]
    held_out: HeldOutData | None

    @property
    def names(self) -> list[str]:
        """Of all scores."""
        return score_names(self.benchmarks, self.held_out.plan.source_names if self.held_out else ())

    @property
    def fingerprint(self) -> str:
        """Equal for equal questions: texts, names of images, which is right; and the held-out shards."""
        digest = hashlib.sha256()
        for benchmark in self.benchmarks:
            for item in benchmark.items:
                digest.update(f"{item.text}\0{Path(item.name).name}\0".encode())
            asked = [field.name for field in fields(benchmark) if field.name not in _OF_ITEMS]
            digest.update(repr([getattr(benchmark, name) for name in asked]).encode())
        if self.held_out is not None:
            digest.update(json.dumps(self.held_out.description, sort_keys=True).encode())
        return digest.hexdigest()


_OF_ITEMS = ("items", "addresses", "findings")


def described(sets: ValidationSets | None, config: RunConfig) -> str:
    """What is validated and how often, for the table printed before the first step."""
    if sets is None:
        return f"none{', validate_every is null' * config.validation.names_something}"
    parts = [*_described(sets.benchmarks)]
    if sets.held_out is not None:
        num_pairs = sets.held_out.plan.num_samples
        parts.append(
            f"{sum(num_pairs.values()):,} held-out pairs of {len(num_pairs)} sources in "
            f"{sets.held_out.plan.num_steps:,} batches"
        )
    best = f"; the best checkpoint by {config.keep_best} is kept" if config.keep_best else ""
    return f"every {config.validate_every:,} steps and at the end: {', '.join(parts)}{best}"


def open_sets(config: RunConfig, training: RunData) -> ValidationSets | None:
    """The sets that the section `validation` names; None where there is no validation. Opens no image, writes
    nothing.

    Raises ConfigError, DataError or StorageError with what is wrong with the tables, the held-out shards, or
    the name in keep_best.
    """
    if config.validate_every is None:
        return None
    wanted = config.validation
    paths: dict[str, Path | None] = {
        name: Path(found) if (found := getattr(wanted, name)) else None
        for name in ("mmeb_eval", "mmeb_images", "mmvp", "captions", "caption_images")
    }
    is_first = os.environ.get("RANK", "0") == "0"
    with contextlib.nullcontext() if is_first else contextlib.redirect_stderr(io.StringIO()):
        try:
            benchmarks = read_benchmarks(**paths, max_queries=wanted.max_queries)
        except AgffError as error:
            raise type(error)(f"validation: {error}") from None
    sets = ValidationSets(benchmarks=tuple(benchmarks), held_out=open_held_out(config, training))
    if twice := [name for name, count in Counter(sets.names).items() if count > 1]:
        raise ConfigError(f"validation: several scores are called {', '.join(twice)}; name the sets apart")
    if config.keep_best is not None and config.keep_best not in sets.names:
        raise ConfigError(
            f"keep_best={config.keep_best} is no score of this run's validation; it has\n  "
            + "\n  ".join(sets.names)
        )
    return sets


def check_sets_together(
    run: ResolvedRun, sets: ValidationSets, processor: ItemProcessor, *, hashes: bool
) -> list[list[int]]:
    """For each benchmark the tokens of its used items, in their order.

    Every image's header is read, by one of the ranks, every item asked whether it fits the model, and a batch
    of the held-out pairs made. hashes: compare those of the held-out shards. Raises DataError, with all
    findings, on every rank. Collective; without a process group one process does it all.
    """
    fingerprints = gather_objects(sets.fingerprint)
    if different := [index for index, each in enumerate(fingerprints) if each != fingerprints[0]]:
        raise DataError(
            f"validation: {len(different)} ranks see other evaluation sets or held-out shards than rank 0: "
            f"{', '.join(map(str, different))}; copy the same folders to every machine"
        ).shared()
    if sets.held_out is not None:
        check_shards_together(sets.held_out, hashes=hashes)
        first = sets.held_out.step_batches(run, processor, rank=rank())[0]
        is_wrong = isinstance(first, DataError)
        raise_together(DataError(f"validation.shards: {first}") if is_wrong else None)
    looks = _look_together(images_of(sets.benchmarks))
    lengths, lines = [], []
    for benchmark in sets.benchmarks:
        findings = unreadable(benchmark, looks)
        of_set = []
        for index in benchmark.used:
            if index not in findings:
                try:
                    of_set.append(processor.num_tokens(_blank(benchmark, index, looks)))
                except DataError as error:
                    findings[index] = str(error)
        lengths.append(of_set)
        lines += benchmark.lines(findings)
    try:
        refuse_all([f"validation: {line}" for line in lines], remedy=REMEDY)
    except DataError as error:
        raise error.shared() from None
    return lengths


def _look_together(images: Sequence[Path | EmbeddedImage]) -> dict[Path | EmbeddedImage, Size | str]:
    """{image: its size, or why it cannot be read}; each rank looks at every `world_size`-th. Collective."""
    own = tqdm(
        images[rank() :: world_size()],
        desc="look at images of the validation",
        unit="image",
        file=sys.stderr,
        disable=rank() != 0 or not images,
    )
    found: list[list[Size | str]] = gather_objects([look(image) for image in own])
    return {image: found[index % len(found)][index // len(found)] for index, image in enumerate(images)}


def _blank(benchmark: Benchmark, index: int, looks: dict[Path | EmbeddedImage, Size | str]) -> Item:
    """The item with an image of its size, which is all that its length depends on."""
    item: Any = benchmark.items[index]
    size = looks[item.image] if item.image is not None else None
    image = Image.new("1", size) if isinstance(size, tuple) else None
    return Item(text=item.text, image=image, address=item.name)


def _described(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    mmeb = [benchmark for benchmark in benchmarks if isinstance(benchmark, EvalSet)]
    if mmeb:
        yield f"{len(mmeb)} MMEB sets with {sum(len(each.queries) for each in mmeb):,} queries"
    for benchmark in benchmarks:
        if isinstance(benchmark, MmvpSet):
            yield f"{len(benchmark.pairs):,} pairs of {benchmark.name}"
        elif not isinstance(benchmark, EvalSet):
            yield f"captions of {benchmark.name}"
    if benchmarks:
        yield f"{sum(len(benchmark.used) for benchmark in benchmarks):,} items in all"
