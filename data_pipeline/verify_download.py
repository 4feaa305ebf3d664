"""Is a download complete? Subset by subset, before it is converted."""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from agff.errors import DataError
from agff.images import SHARD_FORMATS, decode_image, read_header, read_image_file
from data_pipeline.layouts.mmeb_train import count_rows, find_subsets, read_pairs
from data_pipeline.layouts.training_rows import Pair
from data_pipeline.verify import in_parallel


@dataclass(frozen=True, kw_only=True)
class SubsetCheck:
    """An MMEB subset before conversion."""

    num_rows: int
    num_images: int
    """Distinct image files that the rows name."""
    problems: list[str]


def _check_subset(root: Path, subset: str, *, split: str, num_rows: int, deep: bool) -> SubsetCheck:
    """Which images are absent or, by their header and end, no whole images; which rows cannot be used. deep:
    decode every image too."""
    rows_of_image: Counter[str] = Counter()
    problems = []
    try:
        for number, pair in enumerate(read_pairs(root, subset, split=split, start=0, stop=num_rows)):
            if isinstance(pair, Pair):
                named = {
                    str(side.image.relative_to(root)) for side in pair.sides if isinstance(side.image, Path)
                }
                rows_of_image.update(named)
            else:
                problems.append(f"{subset}: row {number}: {pair}")
    except DataError as error:  # a damaged page: the rows before it are checked all the same
        problems.append(str(error))
    names_in: dict[str, set[str]] = {}
    missing: dict[str, list[str]] = {}
    wanted: Counter[str] = Counter()
    for image in rows_of_image:
        parent, name = os.path.split(image)
        wanted[parent] += 1
        if parent not in names_in:
            names_in[parent] = _names_in(root / parent)
        if name not in names_in[parent]:
            missing.setdefault(parent, []).append(image)
        else:
            problems += _image_problem(root, subset, image, deep=deep)
    for parent, images in sorted(missing.items()):
        if len(images) == wanted[parent] > 1:
            problems.append(
                f"{subset}: {parent}: all {len(images):,} images are missing; unpack this subset's archive "
                "there"
            )
        else:
            problems += [
                f"{subset}: {image} is missing ({rows_of_image[image]} rows)" for image in sorted(images)
            ]
    return SubsetCheck(num_rows=num_rows, num_images=len(rows_of_image), problems=problems)


def _names_in(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return set()


def _image_problem(root: Path, subset: str, image: str, *, deep: bool) -> list[str]:
    path, address = root / image, f"{subset}: {image}"
    try:
        if deep:
            decode_image(read_image_file(path, address), address, formats=SHARD_FORMATS)
        else:
            read_header(path, address, formats=SHARD_FORMATS)
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{subset}: {image}: cannot read it: {error}"]
    return []


def check_download(
    root: Path, *, split: str, deep: bool, processes: int | None = None
) -> tuple[dict[str, SubsetCheck], list[str]]:
    """What each subset's check found, and the findings of subsets whose tables cannot be read."""
    problems, checks, names = [], [], []
    for subset in find_subsets(root, split=split):
        try:
            num_rows = count_rows(root, subset, split=split)
        except DataError as error:
            problems += str(error).splitlines()
            continue
        names.append(subset)
        checks.append(
            functools.partial(_check_subset, root, subset, split=split, num_rows=num_rows, deep=deep)
        )
    return dict(zip(names, in_parallel(checks, processes, "subset"), strict=True)), problems
