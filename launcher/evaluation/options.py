"""What the command line of `evaluate` says, and the sets that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from agff.collectives import rank
from agff.errors import ConfigError, DataError
from launcher.evaluation.benchmarks import Benchmark, read_benchmarks, text_to_image_set
from launcher.evaluation.scores_file import check_place

_SETS = ("mmeb_eval", "mmvp", "captions", "regions", "caption_quality")
"""Options that name something to score."""


def read_sets(arguments: argparse.Namespace) -> list[Benchmark]:
    """The sets that are asked for; with --example the one of its candidates. Raises AgffError."""
    if all(getattr(arguments, name) is None for name in _SETS):
        wanted = "--example needs images: name" if arguments.example is not None else "nothing to score: name"
        options = ("mmeb_eval", "captions") if arguments.example is not None else _SETS
        raise ConfigError(f"{wanted} {' or '.join(f'--{name} DIR' for name in options)}")
    if arguments.mmeb_eval is None and (arguments.mmeb_images or arguments.max_queries):
        raise ConfigError("--mmeb_images and --max_queries are about MMEB's sets: name --mmeb_eval DIR too")
    if arguments.example is not None and arguments.html is not None:
        raise ConfigError("--example scores nothing, so there is no page: leave out --html")
    if arguments.caption_images is not None and not (arguments.captions or arguments.caption_quality):
        raise ConfigError("--caption_images is about caption sets: name --captions or --caption_quality too")
    if arguments.example is None:
        if arguments.out is None and not arguments.model.is_dir():
            raise ConfigError(f"{arguments.model}: no such folder; name a run or a release")
        if rank() == 0:
            check_place(out_of(arguments))
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
    return benchmarks


def out_of(arguments: argparse.Namespace) -> Path:
    """The file of the scores."""
    return arguments.out or arguments.model / "scores.json"


def _count(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{value} must be >= {minimum}")
        return value

    return number


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="evaluate", description="Score a run or a release on public layouts and your own sets."
    )
    made.add_argument("model", type=Path, help="run folder or release folder")
    _add_sets(made.add_argument_group("what to score"))
    _add_output(made.add_argument_group("what to write and to show"))
    _add_encoding(made.add_argument_group("how to encode and to compare"))
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    return made


def _add_sets(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mmeb_eval", type=Path, help="folder in MMEB-eval's layout")
    group.add_argument(
        "--mmeb_images", type=Path, help="where its images are (default: its images/, then itself)"
    )
    group.add_argument(
        "--max_queries", type=_count(1), metavar="N", help="only the first N queries of each MMEB set"
    )
    group.add_argument("--mmvp", type=Path, help="folder in MMVP-VLM's layout")
    group.add_argument(
        "--captions",
        type=Path,
        help="folder of Flickr30k, COCO, ShareGPT4V, Urban1k, SugarCrepe or a caption set of your own, or of "
        "such folders: retrieval both ways, choices between two captions",
    )
    group.add_argument(
        "--caption_images", type=Path, help="where their images are (default: beside the tables)"
    )
    group.add_argument(
        "--regions", type=Path, help="folder of images with {box, phrase}: retrieval of regions both ways"
    )
    group.add_argument(
        "--caption_quality", type=Path, help="caption set: CIDEr-D of the captions that the model writes"
    )
    group.add_argument(
        "--allow_missing",
        action="store_true",
        help="go on without items that are missing, unreadable or refused: queries without their own item or "
        "truth are left out, other candidates from the lists; both are counted",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", type=Path, help="JSON file to write (default: scores.json in the model's folder)"
    )
    group.add_argument(
        "--html",
        type=Path,
        metavar="OUT",
        help="page to write: scores with their errors, which vectors decide, mistakes and neighbours",
    )
    group.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="SCORES",
        help="scores.json of other models, or their folders, shown beside these on the page",
    )
    group.add_argument(
        "--show", type=_count(0), default=0, metavar="N", help="print N queries of a text-to-image set"
    )
    group.add_argument(
        "--example", metavar="TEXT", help="print the five best images for TEXT and score nothing"
    )


def _add_encoding(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--similarity",
        choices=("fused", "global"),
        default="fused",
        help="score whole items by all their vectors, or by the global ones alone (default: %(default)s)",
    )
    group.add_argument("--batch_size", type=_count(1), default=32, help="items encoded at once")
    group.add_argument(
        "--num_workers",
        type=_count(0),
        metavar="N",
        help="processes of a rank that load and decode items while the model computes (default: its share of "
        "the cores, at most 8, beside a GPU; 0 on a CPU, where the model computes on those cores)",
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep vectors in DIR and take them from there: only those of equal weights, prompts, tokenizer, "
        "processor, text and image bytes",
    )
