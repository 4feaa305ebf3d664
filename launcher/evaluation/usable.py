"""Which items of the sets can be used: everything is looked at before the scoring, all findings are
listed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image
from tqdm import tqdm

from agff.batch import Item
from agff.collectives import gather_objects, rank, world_size
from agff.errors import DataError
from agff.images import FORMATS, read_header
from agff.processor import ItemProcessor
from data_pipeline.layouts.eval_items import MOST_LINES, EmbeddedImage, refuse_all
from launcher.evaluation.benchmarks import Benchmark, content_hash

Size: TypeAlias = tuple[int, int]

REMEDY = (
    "Name the images' folder (--mmeb_images, --caption_images), put these items right, or leave "
    "them out and count them (--allow_missing)."
)


def check_same_sets(benchmarks: Sequence[Benchmark]) -> None:
    """Raise DataError on every rank unless all of them see the same sets and lack the same images.
    Collective."""
    ranks = gather_objects(
        {each.name: (content_hash(each), next(iter(each.lines(each.findings)), "")) for each in benchmarks}
    )
    for name in dict.fromkeys(name for sets in ranks for name in sets):
        hashes, lines = zip(*(sets.get(name, ("", f"no {name}")) for sets in ranks), strict=True)
        if others := [str(index) for index, each in enumerate(hashes) if each != hashes[0]]:
            found = next((f" (rank {index}: {line})" for index, line in enumerate(lines) if line), "")
            raise DataError(
                f"{name}: of {len(ranks)} ranks these see another set than rank 0: {', '.join(others)}{found}"
                "; copy the same folders to every machine"
            ).shared()


def images_of(benchmarks: Sequence[Benchmark]) -> list[Path | EmbeddedImage]:
    """Each image that is not missing, once, in order of appearance."""
    return list(
        dict.fromkeys(
            image
            for benchmark in benchmarks
            for index in benchmark.used
            if index not in benchmark.findings and (image := benchmark.items[index].image) is not None
        )
    )


def look_at_images(benchmarks: Sequence[Benchmark]) -> dict[Path | EmbeddedImage, Size | str]:
    """{image: its size, or why it cannot be read} of all images that are not missing, shared out over the
    ranks. Collective."""
    images = images_of(benchmarks)
    own = images[rank() :: world_size()]
    bar = tqdm(own, desc="look at images", unit="image", file=sys.stderr, disable=rank() > 0)
    looks: list[Size | str] = [(0, 0)] * len(images)
    for source, part in enumerate(gather_objects([look(image) for image in bar])):
        looks[source :: world_size()] = part
    return dict(zip(images, looks, strict=True))


def unreadable(benchmark: Benchmark, looks: Mapping[Path | EmbeddedImage, Size | str]) -> dict[int, str]:
    """{item: why it cannot be used}: what the tables said already, and images that cannot be read."""
    findings = dict(benchmark.findings)
    for index in benchmark.used:
        image = benchmark.items[index].image
        if index in findings or image is None:
            continue
        look = looks[image]
        if problem := look if isinstance(look, str) else benchmark.misfit(index, look):
            findings[index] = problem
    return {index: findings[index] for index in benchmark.used if index in findings}


def lengths_of(
    processor: ItemProcessor,
    benchmarks: Sequence[Benchmark],
    looks: Mapping[Path | EmbeddedImage, Size | str],
) -> list[dict[int, int | str]]:
    """Per set {item: its tokens, or why the processor refuses it} of the used items, asked with the image's
    size alone, shared out over the ranks. Collective."""
    asked = [(number, index) for number, benchmark in enumerate(benchmarks) for index in benchmark.used]
    own: list[tuple[int, int, int | str]] = []
    for number, index in tqdm(
        asked[rank() :: world_size()], desc="check items", unit="item", file=sys.stderr, disable=rank() > 0
    ):
        item = benchmarks[number].items[index]
        size = looks.get(item.image) if item.image is not None else None
        blank = Image.new("1", size) if isinstance(size, tuple) else None
        try:
            length: int | str = processor.num_tokens(Item(text=item.text, image=blank, address=item.name))
        except DataError as error:
            length = str(error)
        own.append((number, index, length))
    lengths: list[dict[int, int | str]] = [{} for _ in benchmarks]
    for number, index, length in sorted(
        (each for part in gather_objects(own) for each in part), key=lambda each: each[:2]
    ):
        lengths[number][index] = length
    return lengths


def keep_usable(
    benchmarks: Sequence[Benchmark], findings: Iterable[Mapping[int, str]], *, allow_missing: bool
) -> tuple[list[Benchmark], list[str]]:
    """(the sets without these items, a sentence for each set of which nothing remains).

    Raises DataError with all findings unless `allow_missing`.
    """
    kept: list[Benchmark] = []
    lines, notes = [], []
    for benchmark, gone in zip(benchmarks, findings, strict=True):
        lines += benchmark.lines(gone)
        remaining = benchmark.without(gone) if gone else benchmark
        if remaining.used:
            kept.append(remaining)
        else:
            notes.append(f"{benchmark.name} is not scored: nothing remains of it without the unusable items.")
    if not allow_missing:
        refuse_all(lines, remedy=REMEDY)
    report_left_out(lines)
    return kept, notes


def report_left_out(lines: Sequence[str]) -> None:
    """Print the findings that --allow_missing passes over, once."""
    if rank() > 0:
        return
    for line in lines[:MOST_LINES]:
        sys.stderr.write(f"left out: {line}\n")
    if len(lines) > MOST_LINES:
        sys.stderr.write(f"left out: {len(lines) - MOST_LINES:,} more\n")


def look(image: Path | EmbeddedImage) -> Size | str:
    """The image's size, or why it cannot be read."""
    content, name = (image.content, image.name) if isinstance(image, EmbeddedImage) else (image, str(image))
    try:
        return read_header(content, name, formats=FORMATS).size
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror or error}"
