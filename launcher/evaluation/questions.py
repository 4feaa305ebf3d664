"""What a set asks of vectors, whatever its kind: a query, its right candidates, and all candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agff.batch import IMAGE_PLACEHOLDER, MMEB_TEXTS
from data_pipeline.layouts.caption_set import CaptionSet, ReferenceSet
from data_pipeline.layouts.eval_items import EvalItem
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from data_pipeline.layouts.region_set import Box, RegionSet
from data_pipeline.layouts.sugarcrepe import ChoiceSet
from launcher.evaluation.benchmarks import Benchmark
from launcher.evaluation.examples import phrasing

MOST_QUESTIONS = 1_000
"""Of a set, drawn evenly: a query of MMEB has a thousand candidates, a caption of COCO five thousand."""


@dataclass(frozen=True)
class Question:
    """Rows of `Asked`."""

    query: int
    right: tuple[int, ...]
    candidates: Sequence[int]
    """Right ones and wrong ones."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The rows of a set: items, or regions of them, with a vector each."""

    vectors_NMD: Tensor
    items: Sequence[EvalItem]
    questions: Sequence[Question]
    num_questions: int
    """Of the set; `questions` has MOST_QUESTIONS at most."""

    @property
    def captions(self) -> dict[int, str]:
        """{row with an image: the texts, four at most, of the questions to which it is a right answer}."""
        texts = [self.items[question.query].text for question in self.questions]
        before, _ = phrasing(texts) if texts else ("", "")
        found: dict[int, dict[str, None]] = {}
        for question, text in zip(self.questions, texts, strict=True):
            if self.items[question.query].image is None:
                for row in question.right:
                    if self.items[row].image is not None:
                        found.setdefault(row, {})[words(EvalItem(text.removeprefix(before)))] = None
        return {row: ", ".join(list(names)[:4]) for row, names in found.items()}


def asked_of(benchmark: Benchmark, said: Any) -> Asked | None:
    """The questions of a set; None where it asks for captions, not for vectors. said: `judges.model_says`."""
    if isinstance(benchmark, ReferenceSet):
        return None
    if isinstance(benchmark, RegionSet):
        return _regions(benchmark, said)
    questions = _questions(benchmark)
    some = _evenly(questions)
    return Asked(
        vectors_NMD=said,
        items=benchmark.items,
        questions=some,
        num_questions=len(questions),
    )


def words(item: EvalItem) -> str:
    """The text of an item for a person: without the image's place, and nothing where the image is alone."""
    text = " ".join(item.text.replace(IMAGE_PLACEHOLDER, " ").split())
    alone = " ".join(MMEB_TEXTS.image_alone.replace(IMAGE_PLACEHOLDER, " ").split())
    return "" if item.image is not None and text == alone else text


def file_name(item: EvalItem) -> str:
    """Of its image, without the ending; "" of a text."""
    return Path(item.image.name).stem if item.image is not None else ""


def _questions(benchmark: EvalSet | MmvpSet | CaptionSet | ChoiceSet) -> list[Question]:
    match benchmark:
        case EvalSet():
            rows = zip(benchmark.queries, benchmark.candidates, strict=True)
            return [Question(query, candidates[:1], candidates) for query, candidates in rows]
        case MmvpSet():
            return [
                Question(text, (image,), pair.images)
                for pair in benchmark.pairs
                for text, image in zip(pair.texts, pair.images, strict=True)
            ]
        case CaptionSet():
            return list(_grouped(benchmark.captions, benchmark.images))
        case ChoiceSet():
            return [
                Question(choice.image, (choice.caption,), (choice.caption, choice.negative))
                for choice in benchmark.choices
            ]


def _grouped(pairs: Iterable[tuple[int, int]], candidates: Sequence[int]) -> Iterator[Question]:
    """One question for each first of the pairs; right are all its seconds."""
    right: dict[int, list[int]] = {}
    for query, own in pairs:
        right.setdefault(query, []).append(own)
    for query, rows in right.items():
        yield Question(query, tuple(dict.fromkeys(rows)), candidates)


def _regions(regions: RegionSet, vectors: dict[int | tuple[int, Box], Tensor]) -> Asked:
    phrases = list(dict.fromkeys(text for text, _ in regions.phrases))
    keys: list[int | tuple[int, Box]] = [*phrases, *regions.regions]
    row_of = {text: row for row, text in enumerate(phrases)}
    pairs = [(row_of[text], len(phrases) + region) for text, region in regions.phrases]
    questions = list(_grouped(pairs, range(len(phrases), len(keys))))
    return Asked(
        vectors_NMD=torch.stack([vectors[key] for key in keys]),
        items=[
            regions.items[key] if isinstance(key, int) else replace(regions.items[key[0]], box=key[1])
            for key in keys
        ],
        questions=_evenly(questions),
        num_questions=len(questions),
    )


def _evenly(questions: Sequence[Question]) -> list[Question]:
    count = min(MOST_QUESTIONS, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]
