"""Set after set: what the model says of it, its scores, and both written before the next one begins."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from agff.collectives import rank
from agff.embedder import Embedder
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from launcher.evaluation.benchmarks import Benchmark
from launcher.evaluation.judges import model_says, score_judged
from launcher.evaluation.pattern_use import pattern_use
from launcher.evaluation.scores import Encodes, score_mmvp, score_set
from launcher.evaluation.scores_file import ScoresFile, Similarity
from launcher.evaluation.truncated import truncated_scores
from launcher.evaluation.unfinished import Unfinished
from launcher.evaluation.usable import report_left_out
from launcher.run.meeting import from_first_rank, together


@dataclass(kw_only=True)
class Evaluation:
    """All ranks encode and score the same; rank 0 writes."""

    model: Embedder
    encode: Encodes
    similarity: Similarity
    allow_missing: bool
    file: ScoresFile
    unfinished: Unfinished
    scored: list[str] = field(default_factory=list)
    """Names of the sets that have scores."""
    failures: list[str] = field(default_factory=list)
    """Addresses of items that turned out unusable while their set was encoded; it has no score."""
    notes: list[str] = field(default_factory=list)
    """Sentences that must appear beside the scores."""

    def sets(
        self, benchmarks: Sequence[Benchmark], *, always: Sequence[Benchmark] = ()
    ) -> Iterator[tuple[Benchmark, Any]]:
        """(set, what the model says of it) for each set whose scores are written now. Collective.

        Sets that were scored before this evaluation was stopped are left out, unless they are in `always`.
        """
        waiting = self._waiting(benchmarks, always)
        for benchmark in waiting:
            said, late = model_says(self.model, benchmark, self.encode)
            lines = benchmark.lines(late)
            if late and not self.allow_missing:
                self.failures += lines
                continue
            report_left_out(lines)
            usable = benchmark.without(late) if late else benchmark
            if not usable.used:
                self.notes.append(
                    f"{usable.name} is not scored: nothing remains of it without the unusable items."
                )
                continue
            if self.similarity == "global" and isinstance(said, Tensor):
                said = said[:, :1]
            self._score(usable, said)
            self.scored.append(usable.name)
            yield usable, said
        if not self.failures:
            together(lambda: self.unfinished.finish() if rank() == 0 else None)

    def _waiting(self, benchmarks: Sequence[Benchmark], always: Sequence[Benchmark]) -> list[Benchmark]:
        def scored_before() -> list[int]:
            there = self.file.results()[0].names
            return [
                number
                for number, each in enumerate(benchmarks)
                if self.unfinished.has(each) and each.name in there and each not in always
            ]

        done = from_first_rank(scored_before)
        names = [benchmarks[number].name for number in done]
        if done and rank() == 0:
            sys.stderr.write(
                f"continues an evaluation that was stopped, after {', '.join(names)}; to score all "
                f"{len(benchmarks)} sets again, remove {self.unfinished.path}\n"
            )
        self.scored += names
        return [each for number, each in enumerate(benchmarks) if number not in done]

    def _score(self, benchmark: Benchmark, said: Any) -> None:
        """Score one set and write it, with what shorter embeddings score and what each pattern gives."""
        model, file = self.model, self.file

        def score_and_write() -> None:
            writes = rank() == 0
            if isinstance(benchmark, EvalSet):
                score = score_set(model, benchmark, said)
                if writes:
                    file.add_set(score, note=benchmark.info.note)
            elif isinstance(benchmark, MmvpSet):
                report = score_mmvp(model, benchmark, said)
                if writes:
                    file.add_mmvp(report)
            else:
                kind, scores = score_judged(model, benchmark, said)
                if writes:
                    file.add_judged(kind, benchmark.name, scores, note=benchmark.note)
            truncated = truncated_scores(model, benchmark, said)
            if writes:
                file.add_truncated(truncated)
                file.add_patterns(benchmark.name, pattern_use(model, benchmark, said))
                self.unfinished.add(benchmark)

        together(score_and_write)
