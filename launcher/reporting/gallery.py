"""What a person sees of the sets that were just encoded: mistakes and neighbours with their pictures, made
while a set's vectors are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agff.embedder import Embedder
from agff.errors import DataError
from data_pipeline.layouts.caption_set import ReferenceSet
from data_pipeline.layouts.eval_items import EvalItem
from launcher.evaluation.benchmarks import Benchmark
from launcher.evaluation.questions import Asked, asked_of, file_name, words
from launcher.pages.pictures import make_thumbnail
from launcher.reporting.answers import Mistake, mistakes_of, nearest

NUM_MISTAKES = 3
"""Shown of a set."""
NUM_NEAREST = 5
"""Shown of images, and of texts."""
NUM_CAPTIONS = 4
"""Written captions shown of a set."""
MAX_PICTURE_BYTES = 6 * 2**20
"""Of all pictures of a page together: one that a phone opens and a mail takes."""
MAX_WORDS = 240
"""Characters of a text that are shown."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An item on the page."""

    words: str
    picture: str
    """A data URI; "" of a text, and of an image that the page has no room for."""
    name: str
    """The file of its image; "" of a text."""
    caption: str
    """What the set calls the image, where it says so; else ""."""


@dataclass(frozen=True, kw_only=True)
class ShownMistake:
    """A wrong candidate above the right one."""

    query: Shown
    right: Shown
    wrong: Shown
    facts: Mistake


@dataclass(frozen=True, kw_only=True)
class ShownNeighbours:
    """An item with the images and the texts of its set that are most similar to it."""

    item: Shown
    images: Sequence[tuple[Shown, float]]
    texts: Sequence[tuple[Shown, float]]


@dataclass(frozen=True, kw_only=True)
class ShownCaption:
    """What a model says of an image, and what people wrote."""

    image: Shown
    said: str
    references: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ShownSet:
    """One set."""

    name: str
    num_questions: int
    """Of which the mistakes are the hardest."""
    num_questions_in_all: int
    num_mistakes: int
    mistakes: Sequence[ShownMistake] = ()
    neighbours: ShownNeighbours | None = None
    captions: Sequence[ShownCaption] = ()


class Gallery:
    """Collects `sets`, each while its embeddings are there; nothing is encoded for it."""

    def __init__(self) -> None:
        self.sets: list[ShownSet] = []
        self.num_left_out = 0
        """Pictures beyond MAX_PICTURE_BYTES."""
        self._pictures: dict[object, str] = {}
        self._num_bytes = 0

    def look(self, model: Embedder, benchmark: Benchmark, said: Any) -> None:
        """Add one set. said: what the model says of it (`judges.model_says`)."""
        if isinstance(benchmark, ReferenceSet):
            self.sets.append(self._captions(benchmark, said))
            return
        asked = asked_of(benchmark, said)
        assert asked is not None, "all other sets ask for vectors"
        captions = asked.captions
        mistakes = mistakes_of(model, asked)
        self.sets.append(
            ShownSet(
                name=benchmark.name,
                num_questions=len(asked.questions),
                num_questions_in_all=asked.num_questions,
                num_mistakes=len(mistakes),
                mistakes=[self._mistake(asked, mistake, captions) for mistake in mistakes[:NUM_MISTAKES]],
                neighbours=self._neighbours(model, asked, captions),
            )
        )

    def _mistake(self, asked: Asked, mistake: Mistake, captions: Mapping[int, str]) -> ShownMistake:
        query, right, wrong = (
            self._row(asked, row, captions) for row in (mistake.query, mistake.right, mistake.wrong)
        )
        return ShownMistake(query=query, right=right, wrong=wrong, facts=mistake)

    def _neighbours(
        self, model: Embedder, asked: Asked, captions: Mapping[int, str]
    ) -> ShownNeighbours | None:
        """Of the first image of the set, else of its first query."""
        named = (row for question in asked.questions for row in (question.query, *question.candidates))
        rows = sorted(set(named))
        row = next((row for row in rows if asked.items[row].image is not None), rows[0])
        others = [other for other in rows if other != row]
        kinds = (
            [other for other in others if (asked.items[other].image is not None) == has_image]
            for has_image in (True, False)
        )
        images, texts = (
            [
                (self._row(asked, other, captions), similarity)
                for other, similarity in nearest(model, asked, row, others=kind, count=NUM_NEAREST)
            ]
            for kind in kinds
        )
        return ShownNeighbours(item=self._row(asked, row, captions), images=images, texts=texts)

    def _captions(self, benchmark: ReferenceSet, said: Mapping[int, str]) -> ShownSet:
        references, count = benchmark.references, min(NUM_CAPTIONS, len(benchmark.references))
        some = [references[index * len(references) // count] for index in range(count)]
        return ShownSet(
            name=benchmark.name,
            num_questions=0,
            num_questions_in_all=0,
            num_mistakes=0,
            captions=[
                ShownCaption(
                    image=self._shown(benchmark.items[image], ""),
                    said=said[image],
                    references=[_cut(text) for text in texts[:3]],
                )
                for image, texts in some
            ],
        )

    def _row(self, asked: Asked, row: int, captions: Mapping[int, str]) -> Shown:
        return self._shown(asked.items[row], captions.get(row, ""))

    def _shown(self, item: EvalItem, caption: str) -> Shown:
        return Shown(
            words=_cut(words(item)),
            picture=self._picture(item) if item.image is not None else "",
            name=file_name(item),
            caption=_cut(caption),
        )

    def _picture(self, item: EvalItem) -> str:
        key = item.image, item.box
        if key not in self._pictures:
            self._pictures[key] = _thumbnail(item)
        picture = self._pictures[key]
        if self._num_bytes + len(picture) > MAX_PICTURE_BYTES:
            self.num_left_out += 1
            return ""
        self._num_bytes += len(picture)
        return picture


def _thumbnail(item: EvalItem) -> str:
    """Its data URI."""
    try:
        opened = item.load({}).image
    except DataError:  # it was read when it was encoded; it is gone by now
        return ""
    assert opened is not None, "an item with an image"
    return make_thumbnail(opened, item.box).data_uri


def _cut(text: str) -> str:
    return text if len(text) <= MAX_WORDS else f"{text[: MAX_WORDS - 1]}…"
