"""`python launcher/evaluate.py RUN_OR_RELEASE --mmeb_eval DIR --mmvp DIR --captions DIR`: scores of a model.

Tables and images are looked at before the model is loaded. Each set's scores are written to scores.json when
they are there, beside those of other sets; then a table is printed. Images are opened batch by batch, and
each item of a set is encoded once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from agff.embedder import Embedder
from agff.errors import AgffError, ConfigError, DataError
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.eval_items import refuse_all
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from launcher.command_line import report
from launcher.evaluation.benchmarks import Benchmark, read_benchmarks, text_to_image_set
from launcher.evaluation.examples import free_text_example, retrieval_example, shown_set
from launcher.evaluation.judge_tables import judge_tables
from launcher.evaluation.judges import check_model, model_says, score_judged
from launcher.evaluation.scores import score_mmvp, score_set
from launcher.evaluation.scores_file import ScoresFile, check_place, settings_of
from launcher.evaluation.tables import mmeb_table, mmvp_table, note_lines, truncations_tables
from launcher.evaluation.truncated import truncated_scores
from launcher.evaluation.usable import (
    REMEDY,
    keep_usable,
    look_at_images,
    refused,
    report_left_out,
    unreadable,
)
from launcher.run.trained_model import load_model

_SETS = ("mmeb_eval", "mmvp", "captions", "regions", "caption_quality")
"""Options that name something to score."""


def run(arguments: argparse.Namespace, load: Callable[[Path], Embedder]) -> tuple[str, list[str]]:
    """Look at everything, load the model, score and write set by set.

    Returns (the text to print, the addresses of items that turned out unusable while their set was encoded;
    their sets have no score).
    """
    benchmarks, notes, model = _prepare(arguments, load)
    example_set = text_to_image_set(benchmarks)
    if arguments.example is not None and example_set is not None:
        shown = shown_set(example_set, 1)
        return free_text_example(model, shown, arguments.example, batch_size=arguments.batch_size), []
    settings = settings_of(model, max_queries=arguments.max_queries)
    file = ScoresFile(
        _out(arguments),
        model=str(arguments.model),
        weights_sha256=model.weights_sha256,
        settings=settings,
    )
    scored, examples, failures = [], [], []
    for benchmark in benchmarks:
        said, late = model_says(model, benchmark, batch_size=arguments.batch_size)
        lines = benchmark.lines(late)
        if late and not arguments.allow_missing:
            failures += lines
            continue
        report_left_out(lines)
        usable = benchmark.without(late) if late else benchmark
        if not usable.used:
            notes.append(f"{usable.name} is not scored: nothing remains of it without the unusable items.")
            continue
        _score(model, usable, said, file)
        scored.append(usable.name)
        if benchmark is example_set and isinstance(usable, EvalSet | CaptionSet) and arguments.show:
            examples = _examples(model, shown_set(usable, arguments.show), said, arguments.show)
    return "\n\n".join([*_report(file, scored, notes), *examples]), failures


def _prepare(
    arguments: argparse.Namespace, load: Callable[[Path], Embedder]
) -> tuple[list[Benchmark], list[str], Embedder]:
    """(the sets without what cannot be used, notes on sets left out whole, the model).

    Raises AgffError with all findings: of the place of the scores, of tables, of images, of the processor.
    """
    if all(getattr(arguments, name) is None for name in _SETS):
        wanted = "--example needs images: name" if arguments.example is not None else "nothing to score: name"
        options = ("mmeb_eval", "captions") if arguments.example is not None else _SETS
        raise ConfigError(f"{wanted} {' or '.join(f'--{name} DIR' for name in options)}")
    if arguments.mmeb_eval is None and (arguments.mmeb_images or arguments.max_queries):
        raise ConfigError("--mmeb_images and --max_queries are about MMEB's sets: name --mmeb_eval DIR too")
    if arguments.caption_images is not None and not (arguments.captions or arguments.caption_quality):
        raise ConfigError("--caption_images is about caption sets: name --captions or --caption_quality too")
    if arguments.example is None:
        if arguments.out is None and not arguments.model.is_dir():
            raise ConfigError(f"{arguments.model}: no such folder; name a run or a release")
        check_place(_out(arguments))
    benchmarks = read_benchmarks(
        mmeb_eval=arguments.mmeb_eval,
        mmeb_images=arguments.mmeb_images,
        mmvp=arguments.mmvp,
        max_queries=arguments.max_queries,
        captions=arguments.captions,
        caption_images=arguments.caption_images,
        regions=arguments.regions,
        caption_quality=arguments.caption_quality,
    )
    example_set = text_to_image_set(benchmarks)
    if example_set is None and (arguments.show or arguments.example is not None):
        raise DataError(
            "--show and --example need a set of texts with images as candidates (--mmeb_eval, --captions)"
        )
    if example_set is not None and arguments.example is not None:
        benchmarks = [example_set]
    allow_missing = arguments.allow_missing
    looks = look_at_images(benchmarks)
    findings = [unreadable(benchmark, looks) for benchmark in benchmarks]
    benchmarks, notes = keep_usable(benchmarks, findings, allow_missing=allow_missing)
    model = load(arguments.model)
    check_model(model, benchmarks)
    findings = refused(model, benchmarks, looks)
    benchmarks, more_notes = keep_usable(benchmarks, findings, allow_missing=allow_missing)
    notes += more_notes
    if not benchmarks:
        raise DataError("\n  ".join(["nothing to score", *notes]))
    return benchmarks, notes, model


def _score(model: Embedder, benchmark: Benchmark, said: Any, file: ScoresFile) -> None:
    """Score one set, from what the model says of it, and write it, with what shorter embeddings score."""
    if isinstance(benchmark, EvalSet):
        file.add_set(score_set(model, benchmark, said), note=benchmark.info.note)
    elif isinstance(benchmark, MmvpSet):
        file.add_mmvp(score_mmvp(model, benchmark, said))
    else:
        kind, scores = score_judged(model, benchmark, said)
        file.add_judged(kind, benchmark.name, scores, note=benchmark.note)
    file.add_truncated(truncated_scores(model, benchmark, said))


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


def _out(arguments: argparse.Namespace) -> Path:
    return arguments.out or arguments.model / "scores.json"


def _count(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{value} must be >= {minimum}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Score a run or a release on public layouts and your own sets."
    )
    parser.add_argument("model", type=Path, help="run folder or release folder")
    parser.add_argument("--mmeb_eval", type=Path, help="folder in MMEB-eval's layout")
    parser.add_argument(
        "--mmeb_images", type=Path, help="where its images are (default: its images/, then itself)"
    )
    parser.add_argument("--mmvp", type=Path, help="folder in MMVP-VLM's layout")
    parser.add_argument(
        "--captions",
        type=Path,
        help="folder of Flickr30k, COCO, ShareGPT4V, Urban1k, SugarCrepe or a caption set of your own, or of "
        "such folders: retrieval both ways, choices between two captions",
    )
    parser.add_argument(
        "--caption_images", type=Path, help="where their images are (default: beside the tables)"
    )
    parser.add_argument(
        "--regions", type=Path, help="folder of images with {box, phrase}: retrieval of regions both ways"
    )
    parser.add_argument(
        "--caption_quality", type=Path, help="caption set: CIDEr-D of the captions that the model writes"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: scores.json in the model's folder)"
    )
    parser.add_argument("--batch_size", type=_count(1), default=32, help="items encoded at once")
    parser.add_argument(
        "--max_queries", type=_count(1), metavar="N", help="only the first N queries of each MMEB set"
    )
    parser.add_argument(
        "--allow_missing",
        action="store_true",
        help="go on without items that are missing, unreadable or refused: queries without their own item or "
        "truth are left out, other candidates from the lists; both are counted",
    )
    parser.add_argument(
        "--show", type=_count(0), default=0, metavar="N", help="print N queries of a text-to-image set"
    )
    parser.add_argument(
        "--example", metavar="TEXT", help="print the five best images for TEXT and score nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None, *, load: Callable[[Path], Embedder] = load_model) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        text, failures = run(arguments, load)
        sys.stdout.write(f"{text}\n" if text else "")
        refuse_all(failures, remedy=f"{REMEDY} The other sets are scored and written.")
    except AgffError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
