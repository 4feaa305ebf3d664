"""`python launcher/evaluate.py RUN_OR_RELEASE --mmeb_eval DIR --mmvp DIR --captions DIR`: scores of a model.

Tables and images are looked at before the model is loaded. Each set's scores are written to scores.json when
they are there, beside those of other sets; then a table is printed. Each item of a set is encoded once.

On several GPUs or machines `torchrun --nproc-per-node 8 launcher/evaluate.py ...`, `deepspeed
launcher/evaluate.py ...` or `srun python launcher/evaluate.py ...`: the ranks share out the items, by length,
and the scores do not depend on how many they are. After a kill the same command continues with the set it was
in.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from agff.collectives import rank
from agff.embedder import Embedder
from agff.errors import AgffError, DataError
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.eval_items import refuse_all
from data_pipeline.layouts.mmeb_eval import EvalSet
from launcher.command_line import exit_code_of
from launcher.encoding.items import encode_items
from launcher.encoding.loading import workers_beside
from launcher.encoding.vector_cache import VectorCache
from launcher.evaluation.benchmarks import Benchmark, text_to_image_set
from launcher.evaluation.examples import free_text_example, retrieval_example, shown_set
from launcher.evaluation.judge_tables import judge_tables
from launcher.evaluation.judges import check_model
from launcher.evaluation.options import out_of, parser, read_sets
from launcher.evaluation.score_sets import Evaluation
from launcher.evaluation.scores import Encodes
from launcher.evaluation.scores_file import ScoresFile, settings_of
from launcher.evaluation.tables import mmeb_table, mmvp_table, note_lines, truncations_tables
from launcher.evaluation.unfinished import Unfinished
from launcher.evaluation.usable import (
    REMEDY,
    check_same_sets,
    keep_usable,
    lengths_of,
    look_at_images,
    unreadable,
)
from launcher.reporting.card import refresh_card
from launcher.reporting.gallery import Gallery
from launcher.reporting.page import check_report, write_report
from launcher.run.meeting import from_first_rank, leave, meet, together
from launcher.run.ranks import rank_from_environment
from launcher.run.trained_model import load_model, load_together


def run(arguments: argparse.Namespace, load: Callable[[Path], Embedder]) -> tuple[str, list[str]]:
    """Look at everything, load the model, score and write set by set. Collective.

    Returns (the text to print, the addresses of items that turned out unusable while their set was encoded;
    their sets have no score).
    """
    benchmarks, notes, model = _prepare(arguments, load)
    encode = _encodes(arguments, model)
    example_set = text_to_image_set(benchmarks)
    if arguments.example is not None and example_set is not None:
        return free_text_example(model, shown_set(example_set, 1), arguments.example, encode), []
    examples, gallery = [], Gallery()
    with contextlib.ExitStack() as held:
        evaluation = _evaluation(arguments, model, encode, benchmarks)
        from_first_rank(lambda: held.enter_context(evaluation.unfinished.held()))
        always = [example_set] if example_set is not None and arguments.show else []
        for benchmark, said in evaluation.sets(benchmarks, always=always):
            if arguments.html is not None:
                from_first_rank(functools.partial(gallery.look, model, benchmark, said))
            if isinstance(benchmark, EvalSet | CaptionSet) and _is_in(always, benchmark):
                examples = _examples(model, shown_set(benchmark, arguments.show), said, arguments.show)
    notes += evaluation.notes
    report = from_first_rank(lambda: _report(evaluation.file, evaluation.scored, notes))
    if evaluation.scored:
        from_first_rank(lambda: _publish(arguments, evaluation.file, gallery))
        examples += [f"report: {arguments.html}"] * (arguments.html is not None)
    return "\n\n".join([*report, *examples]), evaluation.failures


def _publish(arguments: argparse.Namespace, file: ScoresFile, gallery: Gallery) -> None:
    """The scores on the release's card and on the page."""
    results, _ = file.results()
    refresh_card(arguments.model, file.path, results)
    if arguments.html is not None:
        write_report(
            arguments.html,
            model=arguments.model,
            results=results,
            gallery=gallery,
            compared=arguments.compare,
        )


def _is_in(benchmarks: Sequence[Benchmark], benchmark: Benchmark) -> bool:
    """Whether it is one of these, perhaps with fewer items."""
    return (type(benchmark), benchmark.name) in [(type(each), each.name) for each in benchmarks]


def _evaluation(
    arguments: argparse.Namespace, model: Embedder, encode: Encodes, benchmarks: Sequence[Benchmark]
) -> Evaluation:
    out, weights = out_of(arguments), model.weights_sha256
    settings = settings_of(model, max_queries=arguments.max_queries, similarity=arguments.similarity)
    return Evaluation(
        model=model,
        encode=encode,
        similarity=arguments.similarity,
        allow_missing=arguments.allow_missing,
        file=ScoresFile(out, model=str(arguments.model), weights_sha256=weights, settings=settings),
        unfinished=Unfinished(out, benchmarks, weights_sha256=weights, settings=settings),
    )


def _encodes(arguments: argparse.Namespace, model: Embedder) -> Encodes:
    num_workers = arguments.num_workers
    if num_workers is None:
        num_workers = workers_beside(model.device)
    return functools.partial(
        encode_items,
        model,
        batch_size=arguments.batch_size,
        num_workers=num_workers,
        cache=VectorCache(arguments.cache, model) if arguments.cache is not None else None,
    )


def _prepare(
    arguments: argparse.Namespace, load: Callable[[Path], Embedder]
) -> tuple[list[Benchmark], list[str], Embedder]:
    """(the sets without what cannot be used, notes on sets left out whole, the model). Collective.

    Raises AgffError with all findings: of the place of the scores, of tables, of images, of the processor.
    """
    from_first_rank(lambda: check_report(arguments.html, arguments.compare, out=out_of(arguments)))
    benchmarks = together(lambda: read_sets(arguments))
    check_same_sets(benchmarks)
    allow_missing = arguments.allow_missing
    looks = look_at_images(benchmarks)
    findings = [unreadable(benchmark, looks) for benchmark in benchmarks]
    benchmarks, notes = keep_usable(benchmarks, findings, allow_missing=allow_missing)
    model = load_together(lambda: load(arguments.model))
    check_model(model, benchmarks)
    lengths = lengths_of(model.processor, benchmarks, looks)
    findings = [
        {item: found for item, found in of_set.items() if isinstance(found, str)} for of_set in lengths
    ]
    benchmarks, more_notes = keep_usable(benchmarks, findings, allow_missing=allow_missing)
    notes += more_notes
    if not benchmarks:
        raise DataError("\n  ".join(["nothing to score", *notes]))
    return benchmarks, notes, model


def _examples(model: Embedder, eval_set: EvalSet, items_NMD: Tensor, num_shown: int) -> list[str]:
    num_queries = len(eval_set.queries)
    count = min(num_shown, num_queries)
    rows = [index * num_queries // count for index in range(count)]
    return [retrieval_example(model, eval_set, items_NMD, row) for row in rows]


def _report(file: ScoresFile, scored: Sequence[str], notes: Sequence[str]) -> list[str]:
    """Tables and notes of all scores of these weights, also those of earlier runs."""
    if not scored:
        return list(map(note_lines, notes))
    results, num_others = file.results()
    tables = []
    if (mmeb := results.mmeb) is not None:
        tables.append(mmeb_table(mmeb))
    if results.mmvp is not None:
        tables.append(mmvp_table(results.mmvp))
    tables += judge_tables(results.judged)
    tables += truncations_tables(results.truncated, mmeb_sets=list(results.sets))
    earlier = [name for name in results.names if name not in scored]
    notes = [*results.notes, *notes]
    if earlier:
        notes.append(f"from earlier runs of the same weights and settings: {', '.join(earlier)}.")
    if num_others:
        notes.append(
            f'{file.path} also keeps the scores of {num_others} other weights or settings, under "other".'
        )
    return [*tables, *map(note_lines, notes), f"written: {file.path}"]


def main(argv: Sequence[str] | None = None, *, load: Callable[[Path], Embedder] = load_model) -> int:
    """Entry point of every rank; returns the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, of torch's new names
    arguments = parser().parse_args(argv)
    return exit_code_of(lambda: _evaluate(arguments, load))


def _evaluate(arguments: argparse.Namespace, load: Callable[[Path], Embedder]) -> int:
    meet(rank_from_environment(os.environ))
    try:
        text, failures = run(arguments, load)
        if rank() == 0:
            sys.stdout.write(f"{text}\n" if text else "")
            sys.stdout.flush()
        refuse_all(failures, remedy=f"{REMEDY} The other sets are scored and written.")
    except AgffError as error:
        raise error.shared() from None  # they all have it: what one rank alone has, it says to the others
    leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
