"""What a step consumes, drawn as the loader draws it: small pictures, and texts as the model sees them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from agff.batch import Item
from agff.errors import DataError
from agff.processor import ItemProcessor
from data_pipeline.decode import decode
from data_pipeline.plan import Plan
from data_pipeline.reader import PAIR_ROLES, RawSample, ShardReader, negative_role, roles_of
from launcher.pages.pictures import Thumbnail, make_thumbnail


@dataclass(frozen=True, kw_only=True)
class SeenText:
    """An item's row of tokens, decoded back into text."""

    before: str
    """Text before the image; empty without one."""
    image: str
    """What is shown for the image's tokens; empty without an image."""
    after: str
    prompts: str
    num_tokens: int
    num_lost: int
    """Tokens of the text that did not fit."""


@dataclass(frozen=True, kw_only=True)
class ShownItem:
    """What the page shows of a query, target or negative."""

    text: str
    thumbnail: Thumbnail | None = None
    seen: SeenText | None = None
    """None when the sample cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One sample drawn for a row of the global batch."""

    sample: int
    """Its number in the source."""
    address: str
    """`shard.tar:key`; empty when the sample could not be read."""
    items: Mapping[str, ShownItem]
    """By role: query, target, negative, negative_1, ..."""
    reason: str = ""
    """Why the sample cannot be used; empty when it can."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the global batch: the sample of the plan and, while unusable, those drawn instead."""

    number: int
    draws: tuple[Draw, ...]


@dataclass(frozen=True, kw_only=True)
class SubBatch:
    """Consecutive rows of a global batch from one source."""

    source: str
    rows: tuple[Row, ...]

    @property
    def num_unusable(self) -> int:
        """How many samples drawn for its rows cannot be used."""
        return sum(bool(draw.reason) for row in self.rows for draw in row.draws)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one training step consumes."""

    number: int
    sub_batches: tuple[SubBatch, ...]


class TextView:
    """Shows items as the model gets them, through the processor that training uses."""

    def __init__(self, processor: ItemProcessor) -> None:
        self.processor = processor
        self._unlimited = copy.copy(processor)
        self._unlimited.limits = dataclasses.replace(processor.limits, max_tokens=sys.maxsize)

    def __call__(self, item: Item) -> SeenText:
        """Raises DataError for an item that the backbone cannot take."""
        inputs = self.processor([item])
        prompt_start = int(inputs["prompt_start_B"][0])
        ids = inputs["input_ids"][0, : prompt_start + self.processor.prompts.num_tokens].tolist()
        image_start, image_stop, image = 0, 0, ""
        if item.image is not None:
            places = [place for place, token in enumerate(ids) if token == self.processor.image_token_id]
            opening, closing = self.processor.family.around_image
            image_start, image_stop = places[0] - len(opening), places[-1] + 1 + len(closing)
            image = f"{''.join(opening)}<image: {len(places)} tokens>{''.join(closing)}"
        return SeenText(
            before=self._text(ids[:image_start]),
            image=image,
            after=self._text(ids[image_stop:prompt_start]),
            prompts=f"<prompt x{len(ids) - prompt_start}>",
            num_tokens=len(ids),
            num_lost=self._unlimited.num_tokens(item) - self.processor.num_tokens(item),
        )

    def _text(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """Draws the rows of global batches as the loader does, and shows what was drawn."""

    plan: Plan
    reader: ShardReader
    text_view: TextView
    with_negatives: bool
    max_bad_in_a_row: int
    """Unusable samples drawn for a row before training stops; the row ends there."""

    def step(self, number: int, bar: tqdm) -> Step:
        """The step's global batch; `bar` advances by one for each pair."""
        rows, size = self.plan.global_batch(number), self.plan.description["sub_batch_size"]
        return Step(
            number=number,
            sub_batches=tuple(
                self._sub_batch(number, start, rows[start : start + size], bar)
                for start in range(0, len(rows), size)
            ),
        )

    def _sub_batch(self, step: int, start: int, rows: NDArray[np.int64], bar: tqdm) -> SubBatch:
        source = self.plan.source_names[int(rows[0, 0])]
        own = []
        for number, sample in enumerate(rows[:, 1], start=start):
            own.append(self._row(step, number, source, int(sample)))
            bar.update()
        return SubBatch(source=source, rows=tuple(own))

    def _row(self, step: int, number: int, source: str, sample: int) -> Row:
        draws: list[Draw] = []
        while not draws or (draws[-1].reason and len(draws) <= self.max_bad_in_a_row):
            attempt = len(draws)
            region = functools.partial(self.plan.region, step=step, row=number, attempt=attempt)
            drawn = self.plan.redraw(step, number, attempt=attempt) if attempt else sample
            draws.append(self._draw(source, drawn, region))
        return Row(number=number, draws=tuple(draws))

    def _draw(self, source: str, sample: int, region: Callable[[int], int]) -> Draw:
        raw = None
        try:
            raw = self.reader.read(source, sample)
            return Draw(sample=sample, address=raw.address, items=self._items(raw, region))
        except DataError as error:
            items = _texts(raw.record) if raw else {}
            return Draw(sample=sample, address=raw.address if raw else "", items=items, reason=str(error))

    def _items(self, raw: RawSample, region: Callable[[int], int]) -> dict[str, ShownItem]:
        seen_pixels = self.text_view.processor.max_image_pixels
        example = decode(raw, with_negatives=self.with_negatives, seen_pixels=seen_pixels, draw=region)
        roles = (*PAIR_ROLES, *map(negative_role, range(len(example.negatives))))
        return {role: self._item(item) for role, item in zip(roles, example.items, strict=True)}

    def _item(self, item: Item) -> ShownItem:
        return ShownItem(
            text=item.text,
            thumbnail=make_thumbnail(item.image, item.box) if item.image else None,
            seen=self.text_view(item),
        )


def _texts(record: object) -> dict[str, ShownItem]:
    """The texts of a record that may be malformed."""
    sides = record if isinstance(record, Mapping) else {}
    return {
        role: ShownItem(text=str(sides[role]["text"])) for role in roles_of(sides) if "text" in sides[role]
    }
