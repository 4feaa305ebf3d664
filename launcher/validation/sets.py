"""What a run is validated on, opened and looked at before the first step."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from agff.collectives import raise_together, rank
from agff.errors import AgffError, ConfigError, DataError
from agff.processor import ItemProcessor
from data_pipeline.layouts.eval_items import refuse_all
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from launcher.evaluation.benchmarks import Benchmark, read_benchmarks
from launcher.evaluation.usable import check_same_sets, lengths_of, look_at_images, unreadable
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

    Do all ranks see the same sets? Every image's header is read and every item asked whether it fits the
    model, by one of the ranks; a batch of the held-out pairs is made. hashes: compare those of the held-out
    shards. Raises DataError, with all findings, on every rank. Collective; without a process group one
    process does it all.
    """
    check_same_sets(sets.benchmarks)
    if sets.held_out is not None:
        check_shards_together(sets.held_out, hashes=hashes)
        first = sets.held_out.step_batches(run, processor, rank=rank())[0]
        is_wrong = isinstance(first, DataError)
        raise_together(DataError(f"validation.shards: {first}") if is_wrong else None)
    looks = look_at_images(sets.benchmarks)
    lengths, lines = [], []
    for benchmark, of_set in zip(sets.benchmarks, lengths_of(processor, sets.benchmarks, looks), strict=True):
        refused = {index: found for index, found in of_set.items() if isinstance(found, str)}
        lines += benchmark.lines({**refused, **unreadable(benchmark, looks)})
        lengths.append([found for index in benchmark.used if isinstance(found := of_set[index], int)])
    try:
        refuse_all([f"validation: {line}" for line in lines], remedy=REMEDY)
    except DataError as error:
        raise error.shared() from None
    return lengths


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
