"""Validation between two steps: all ranks encode with the live engine, and the training goes on as if nothing
had been."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

from torch import Tensor

from agff.batch import Batch, Item, ModelInputs, ProcessItems, SkippedSample
from agff.checkpoint_folder import remove_old_checkpoints
from agff.collectives import gather_objects, max_over_ranks, rank
from agff.embedder import Embedder
from agff.engine import Engine
from agff.errors import AgffError, DataError
from agff.processor import ItemProcessor
from agff.shared_encoding import encode_shared, own_chunks
from data_pipeline.collate import FixedRows, TokenBudget
from launcher.evaluation.benchmarks import Benchmark
from launcher.run.config import ResolvedRun
from launcher.run.data import process_of
from launcher.run.meeting import from_first_rank
from launcher.validation.held_out import (
    HeldOutData,
    Pairs,
    encode_batch,
    recall_of_source,
    sources_of_rows,
)
from launcher.validation.history import History
from launcher.validation.scores import LOSS, means, recall_scores, scores_of

Value = TypeVar("Value")
Made = TypeVar("Made")
log = logging.getLogger(__name__)


def is_due(run: ResolvedRun, step: int) -> bool:
    """Whether a run is validated after this step."""
    every, num_steps = run.config.validate_every, run.config.num_steps
    return every is not None and step > 0 and (step % every == 0 or step == num_steps)


def is_missing(history: History | None, run: ResolvedRun, step: int) -> bool:
    """Whether that is due after a step which the run has done, and not there."""
    return history is not None and is_due(run, step) and not history.has(step)


class _Judge(Embedder):
    """Compares on the device what is kept on the host: the embeddings of a large set are gigabytes."""

    def similarity(self, a_NMD: Tensor, b_CMD: Tensor) -> Tensor:
        """See Embedder; on the host."""
        return super().similarity(a_NMD.to(self.device), b_CMD.to(self.device)).cpu()


class Validator:
    """Validates a run after the steps that are due. Every rank makes one; all its methods are collective."""

    def __init__(
        self,
        run: ResolvedRun,
        engine: Engine,
        processor: ItemProcessor,
        history: History,
        lengths: Sequence[Sequence[int]],
        *,
        report: Callable[[int, dict[str, float], float, int | None], None],
        mark: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """lengths: of `check_sets_together`. report: takes step, scores, seconds and the best step, on every
        rank. mark: called with what this rank does next. should_stop: whether this rank was asked to."""
        self._run, self._engine, self._processor, self._history = run, engine, processor, history
        self._sets, self._lengths = history.sets, lengths
        self._report, self._mark, self._should_stop = report, mark, should_stop
        self._problems: list[str] = []
        self.was_cut_short = False
        """The last validation ended without scores, since a rank was asked to stop."""

    def before_steps(self, start_step: int) -> None:
        """Validate where it is due and was not done, as when the run was ended between save and scores."""
        if is_missing(self._history, self._run, start_step):
            self._validate(start_step)

    def after_step(self, step: int) -> None:
        """Validate where it is due."""
        if is_due(self._run, step):
            self._validate(step)

    def _validate(self, step: int) -> None:
        """Score, record, remove what is no longer the best, report. Nothing of it when a rank was asked to
        stop: the next start at this step does it."""
        started = time.perf_counter()
        with self._engine.evaluating(seed=self._run.config.seed):
            scores = self._scores(step)
        self.was_cut_short = scores is None
        if scores is None:
            if rank() == 0:
                log.warning("step %d: asked to stop, so its validation is left to the next start", step)
            return
        self._history.record(step, scores)
        best = from_first_rank(self._remove_old)
        self._report(step, scores, time.perf_counter() - started, best)

    def _remove_old(self) -> int | None:
        """The best step; the checkpoint of the one before it goes where it took its place."""
        best, config = self._history.best_step(), self._run.config
        remove_old_checkpoints(
            self._run.run_dir, keep_last=config.keep_last, keep_every=config.keep_every, best=best
        )
        return best

    def _scores(self, step: int) -> dict[str, float] | None:
        config = self._run.config
        model: Any = self._engine.model
        judge = _Judge(model, self._processor, config.fusion, texts=config.texts)
        scores: dict[str, float] = {}
        for benchmark, lengths in zip(self._sets.benchmarks, self._lengths, strict=True):
            items_NMD = self._encode(benchmark, lengths, f"validation after step {step}: {benchmark.name}")
            if items_NMD is not None:
                self._mark(f"validation after step {step}: scoring {benchmark.name}")
                scores |= scores_of(judge, benchmark, items_NMD)
            elif self._is_stopped(benchmark.name):
                return None
        if self._sets.held_out is not None:
            found = self._held_out(
                judge, self._sets.held_out, f"validation after step {step}: held-out pairs"
            )
            if found is None and self._is_stopped("the held-out pairs"):
                return None
            scores |= found or {}
        names = self._sets.names
        scores |= means(scores, names)
        return {name: scores[name] for name in names if name in scores}

    def _encode(self, benchmark: Benchmark, lengths: Sequence[int], what: str) -> Tensor | None:
        """(N, M, D) embeddings of all items, those that are not used zero; None when an item cannot be read
        now, a rank was asked to stop, or they are not finite."""
        used, chunks, process = benchmark.used, self._chunks(lengths), self._process_of(benchmark)

        def inputs_of(chunk: Sequence[int]) -> ModelInputs | None:
            return self._or_note(lambda: process([benchmark.items[used[place]].load({}) for place in chunk]))

        with closing(_one_ahead(inputs_of, own_chunks(chunks))) as inputs:
            used_UMD = encode_shared(
                self._engine.encode,
                chunks,
                self._marked(inputs, what),
                filler=process([Item(text="")]),
                num_items=len(used),
                device=self._engine.device,
                should_stop=self._should_stop,
            )
        if used_UMD is None or not self._are_finite(used_UMD):
            return None
        items_NMD = used_UMD.new_zeros(len(benchmark.items), *used_UMD.shape[1:])
        items_NMD[list(used)] = used_UMD
        return items_NMD

    def _process_of(self, benchmark: Benchmark) -> ProcessItems:
        """The release of a run on texts alone embeds images all the same, so they are scored here too."""
        has_images = any(benchmark.items[index].image is not None for index in benchmark.used)
        return self._processor if has_images else process_of(self._run.config, self._processor)

    def _chunks(self, lengths: Sequence[int]) -> list[list[int]]:
        """As many items at once as pass 1 of a step encodes, without a graph; a chunk for each rank where
        there are items enough."""
        at_once, chunking = self._engine.first_pass_chunks, self._run.chunking
        if isinstance(chunking, TokenBudget):
            chunks = TokenBudget(max_tokens=at_once * chunking.max_tokens).cut(lengths)
        else:
            chunks = FixedRows(rows=at_once * chunking.rows).cut(lengths)
        if len(chunks) < self._run.world_size:
            chunks = FixedRows(rows=-(-len(lengths) // self._run.world_size)).cut(lengths)
        return chunks

    def _held_out(self, judge: Embedder, data: HeldOutData, what: str) -> dict[str, float] | None:
        """Loss and recall; None as in `_encode`."""
        config, engine = self._run.config, self._engine
        batches = data.step_batches(self._run, self._processor, rank=rank())
        steps = range(data.plan.num_steps)
        losses: list[float] = []
        parts: list[Pairs] = []
        skipped: list[SkippedSample] = []

        def batch_of(step: int) -> Batch | None:
            return self._or_note(lambda: _batch_or_raise(batches[step]))

        with closing(_one_ahead(batch_of, steps)) as coming:
            for step, batch in zip(steps, self._marked(coming, what), strict=True):
                if max_over_ranks([batch is None or self._should_stop()], device=engine.device)[0]:
                    return None
                assert batch is not None
                loss, pairs = encode_batch(engine, config, batch, source_P=sources_of_rows(data.plan, step))
                losses.append(loss)
                parts.append(pairs)
                skipped += batch.skipped
        self._report_skipped(skipped)
        together = Pairs.joined(parts)
        if not (self._are_finite(together.query_PMD) and self._are_finite(together.target_PMD)):
            return None
        scores = {LOSS: sum(losses) / len(losses)}
        for index, source in enumerate(data.plan.source_names):
            scores |= recall_scores(f"held_out/{source}", recall_of_source(judge, together.of_source(index)))
        return scores

    def _report_skipped(self, skipped: Sequence[SkippedSample]) -> None:
        for sample in (sample for samples in gather_objects(list(skipped)) for sample in samples):
            if rank() == 0:
                log.warning(
                    "validation: held-out sample left out, another of %s taken: %s",
                    sample.source,
                    sample.reason,
                )

    def _or_note(self, make: Callable[[], Value]) -> Value | None:
        """What it makes; None, and a problem noted, where it cannot."""
        try:
            return make()
        except AgffError as error:
            self._problems.append(str(error))
            return None

    def _are_finite(self, vectors: Tensor) -> bool:
        """The same on every rank, which hold the same bits."""
        if bool(vectors.isfinite().all()):
            return True
        self._problems.append("the model gives embeddings that are not finite")
        return False

    def _is_stopped(self, what: str) -> bool:
        """Why a set has no scores: a rank was asked to stop (True), or the problems that are logged."""
        found = gather_objects((bool(self._should_stop()), self._problems))
        self._problems = []
        if any(is_stopped for is_stopped, _ in found):
            return True
        problems = list(dict.fromkeys(problem for _, problems in found for problem in problems))
        if rank() == 0:
            log.error("%s is not scored in this validation: %s", what, "; ".join(problems))
        return False

    def _marked(self, values: Iterable[Value], what: str) -> Iterator[Value]:
        for index, value in enumerate(values):
            self._mark(f"{what}, chunk {index + 1} of this rank")
            yield value


def _batch_or_raise(found: object) -> Batch:
    if isinstance(found, DataError):
        raise found
    assert isinstance(found, Batch)
    return found


def _one_ahead(make: Callable[[Value], Made], values: Iterable[Value]) -> Generator[Made]:
    """make(value) of each value, the next one made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for value in values:
            found, coming = coming, thread.submit(make, value)
            if found is not None:
                yield found.result()
        if coming is not None:
            yield coming.result()
