"""`python launcher/evaluate.py RUN_OR_RELEASE --mmeb_eval DIR --mmvp DIR`: scores with the fused similarity.

Prints a table and writes scores.json. Images are opened batch by batch, and each item of a set is encoded
once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agff.errors import AgffError, ConfigError, DataError
from agff.files import write_text
from agff.scoring import MmebReport, MmvpReport, mmeb_report
from data_pipeline.layouts.mmeb_eval import EvalSet, find_eval_sets, read_eval_set
from data_pipeline.layouts.mmvp import MmvpPair, read_mmvp
from launcher.command_line import report
from launcher.evaluation.examples import free_text_example, is_text_to_image, retrieval_example
from launcher.evaluation.scores import EmbeddingModel, encode_items, score_mmvp, score_set
from launcher.evaluation.tables import mmeb_table, mmvp_table, report_values
from launcher.run.trained_model import load_model


def run(arguments: argparse.Namespace, load: Callable[[Path], EmbeddingModel]) -> str:
    """Read everything, load the model, score, write the JSON; the text to print."""
    sets, pairs = _read_benchmarks(arguments)
    example_set = next(filter(is_text_to_image, sets), None)
    if example_set is None and (arguments.show or arguments.example is not None):
        raise DataError("--show and --example need a set of texts with images as candidates (--mmeb_eval)")
    model = load(arguments.model)
    if arguments.example is not None and example_set is not None:
        return free_text_example(model, example_set, arguments.example, batch_size=arguments.batch_size)
    mmeb, examples = _score_sets(model, sets, example_set, arguments)
    mmvp = score_mmvp(model, pairs, batch_size=arguments.batch_size) if pairs else None
    notes = _notes(sets, arguments.max_queries)
    out = arguments.out or arguments.model / "scores.json"
    write_scores(
        out,
        {
            "model": str(arguments.model),
            "weights_sha256": getattr(model, "weights_sha256", None),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "num_mmeb_queries": mmeb.overall.num_queries if mmeb else 0,
            "num_mmvp_pairs": len(pairs),
            "max_queries": arguments.max_queries,
            "notes": notes,
            **report_values(mmeb, mmvp),
        },
    )
    return "\n\n".join(
        [*_tables(mmeb, mmvp), *(f"Note: {note}" for note in notes), *examples, f"written: {out}"]
    )


def write_scores(path: Path, values: Mapping[str, Any]) -> None:
    """Write the JSON file in one piece: an interrupted run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _read_benchmarks(arguments: argparse.Namespace) -> tuple[list[EvalSet], tuple[MmvpPair, ...]]:
    """Everything to be scored, checked before anything is encoded."""
    root: Path | None = arguments.mmeb_eval
    if root is None and arguments.mmvp is None:
        raise ConfigError("nothing to score: name --mmeb_eval DIR, --mmvp DIR or both")
    sets = [
        read_eval_set(root, name, info, images_root=arguments.mmeb_images, max_queries=arguments.max_queries)
        for name, info in (find_eval_sets(root) if root is not None else {}).items()
        if root is not None
    ]
    return sets, read_mmvp(arguments.mmvp) if arguments.mmvp is not None else ()


def _score_sets(
    model: EmbeddingModel, sets: Sequence[EvalSet], example_set: EvalSet | None, arguments: argparse.Namespace
) -> tuple[MmebReport | None, list[str]]:
    """The report and the examples asked for; one set's embeddings are held at a time."""
    scores, examples = [], []
    for eval_set in sets:
        items_NMD = encode_items(model, eval_set.items, batch_size=arguments.batch_size, label=eval_set.name)
        scores.append(score_set(model, eval_set, items_NMD))
        if eval_set is example_set:
            num_queries = len(eval_set.queries)
            count = min(arguments.show, num_queries)
            rows = [index * num_queries // count for index in range(count)]
            examples = [retrieval_example(model, eval_set, items_NMD, row) for row in rows]
    return (mmeb_report(scores) if scores else None), examples


def _tables(mmeb: MmebReport | None, mmvp: MmvpReport | None) -> list[str]:
    return [*([mmeb_table(mmeb)] if mmeb else []), *([mmvp_table(mmvp)] if mmvp else [])]


def _notes(sets: Sequence[EvalSet], max_queries: int | None) -> list[str]:
    notes = list(dict.fromkeys(eval_set.info.note for eval_set in sets if eval_set.info.note))
    if max_queries is not None:
        notes.append(f"only the first {max_queries} queries of each MMEB set were scored.")
    return notes


def _count(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{value} must be >= {minimum}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Score a run or a release with the fused similarity."
    )
    parser.add_argument("model", type=Path, help="run folder or release folder")
    parser.add_argument("--mmeb_eval", type=Path, help="folder in MMEB-eval's layout")
    parser.add_argument(
        "--mmeb_images", type=Path, help="where its images are (default: its images/, then itself)"
    )
    parser.add_argument("--mmvp", type=Path, help="folder in MMVP-VLM's layout")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: scores.json in the model's folder)"
    )
    parser.add_argument("--batch_size", type=_count(1), default=32, help="items encoded at once")
    parser.add_argument(
        "--max_queries", type=_count(1), metavar="N", help="only the first N queries of each MMEB set"
    )
    parser.add_argument(
        "--show", type=_count(0), default=0, metavar="N", help="print N queries of a text-to-image set"
    )
    parser.add_argument(
        "--example", metavar="TEXT", help="print the five best images for TEXT and score nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None, *, load: Callable[[Path], EmbeddingModel] = load_model) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        text = run(arguments, load)
    except AgffError as error:
        return report(error)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
