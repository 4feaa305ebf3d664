"""Bytes -> example: texts and RGB images, each error with the address of its sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agff.batch import Item, SeesPairs, text_problem
from agff.errors import DataError
from agff.images import SHARD_FORMATS, decode_image
from data_pipeline.reader import NOT_A_RECORD, PAIR_ROLES, RawSample
from data_pipeline.regions import first_region, scaled_box, sides_of


@dataclass(frozen=True, kw_only=True)
class Example:
    """A decoded pair."""

    query: Item
    target: Item
    negatives: tuple[Item, ...] = ()
    """Explicit hard negatives, where the source has them."""
    query_id: int
    target_id: int
    negative_ids: tuple[int, ...] = ()
    address: str
    source: str = ""
    vectors: np.ndarray | None = None
    """(2, E) of a teacher, of query and target, where the run has them."""
    pair_data: Mapping[str, float] = field(default_factory=dict)
    """What the objective wants to know of the pair."""

    @property
    def items(self) -> tuple[Item, ...]:
        """Query, target and negatives."""
        return (self.query, self.target, *self.negatives)

    def seen_by(self, objective: SeesPairs) -> Example:
        """The pair with what the objective makes of its items, and wants to know of it."""
        query, target = objective.items_of_pair(self.source, self.query, self.target)
        data = objective.pair_data_of(self.source, self.query, self.target)
        return replace(self, query=query, target=target, pair_data=data)


def decode(
    raw: RawSample,
    *,
    source: str = "",
    with_negatives: bool = True,
    seen_pixels: int | None = None,
    draw: Callable[[int], int] = first_region,
) -> Example:
    """Raises DataError for whatever is wrong with the sample; its text starts with the address.

    with_negatives: False leaves explicit negatives out. seen_pixels: what the model sees of one image at
    most. draw: the number of an image's regions -> the one that is taken.
    """
    try:
        sides = sides_of(raw.record, draw)
        negatives = [role for role in sides if role not in PAIR_ROLES] if with_negatives else []
        return Example(
            query=_item("query", sides["query"], raw, seen_pixels),
            target=_item("target", sides["target"], raw, seen_pixels),
            negatives=tuple(_item(role, sides[role], raw, seen_pixels) for role in negatives),
            query_id=_content_id(sides["query"]["id"]),
            target_id=_content_id(sides["target"]["id"]),
            negative_ids=tuple(_content_id(sides[role]["id"]) for role in negatives),
            address=raw.address,
            source=source,
        )
    except KeyError as error:
        raise DataError(f"{raw.address}: member or field {error} is missing") from None
    except (*NOT_A_RECORD, IndexError) as error:
        raise DataError(f"{raw.address}.json: not a sample's record: {error}") from None


def _content_id(value: int) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no content id")
    return value


def _item(role: str, side: Mapping[str, Any], raw: RawSample, seen_pixels: int | None) -> Item:
    text, found, image, box = side["text"], raw.images.get(role), None, None
    instruction = side.get("instruction", "")
    if not isinstance(instruction, str):
        raise DataError(f"{raw.address}.json: {role}: instruction must be a text, found {instruction!r:.60}")
    if problem := text_problem(text, has_image=found is not None):  # before the costly part
        raise DataError(f"{raw.address}.json: {role}: {problem}")
    if found is not None:
        image = decode_image(found.content, found.address, formats=SHARD_FORMATS, seen_pixels=seen_pixels)
        box = scaled_box(side, image.size)
    address = f"{raw.address}: {role}"
    return Item(text=text, image=image, address=address, instruction=instruction, box=box)
