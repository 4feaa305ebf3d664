"""What one step consumes: items (text and image), the backbone's inputs for a chunk of items, and the batch
of chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from agff.errors import ConfigError, DataError

IMAGE_PLACEHOLDER = "<|image_1|>"
"""Marks the place of the image in a text, whatever the backbone; MMEB's own spelling."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to embed. Raises DataError when text and image are not what a model can be given."""

    text: str
    """Holds IMAGE_PLACEHOLDER exactly once when there is an image, never otherwise."""
    image: Image.Image | None = None
    """As agff.images makes it: RGB, upright."""
    address: str = field(default="", compare=False)
    """Where it comes from, for errors; "" where nobody knows."""
    instruction: str = field(default="", compare=False)
    """The part of `text` that is instruction, where the source keeps it apart."""
    box: tuple[float, float, float, float] | None = None
    """The region of `image` that is meant: x0, y0, x1, y1 in its pixels. None: the whole image."""
    caption: str = ""
    """What a model that generates learns to say of the image."""

    def __post_init__(self) -> None:
        if problem := text_problem(self.text, has_image=self.image is not None):
            raise self.error(problem)

    def error(self, problem: str) -> DataError:
        """The problem as an error that names the item."""
        return DataError(f"{self.address}: {problem}" if self.address else problem)


def text_problem(text: object, *, has_image: bool) -> str | None:
    """Why this cannot be an item's text; None when it can.

    It must be a str that UTF-8 can write, with the placeholder once beside an image and never without one.
    """
    if not isinstance(text, str):
        return f"a text must be a str, found {type(text).__name__} {text!r:.60}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text {text[:60]!r} holds half a surrogate pair at character {error.start}"
    if (found := text.count(IMAGE_PLACEHOLDER)) == int(has_image):
        return None
    rule = "beside an image it must appear once" if has_image else "without an image it must not appear"
    return f"{IMAGE_PLACEHOLDER} appears {found} times in text {text[:60]!r}; {rule}"


ModelInputs = Mapping[str, Tensor]
"""Tensors of one chunk of rows (agff/processor.py), of which `agff.family.Family` makes the
backbone's arguments."""

HOST_INPUTS = frozenset(
    {"image_grid_thw", "image_sizes", "image_ids_U", "row_image_ids_B", "row_kind_B", "caption_length_B"}
)
"""Stay on the host: sizes, which image a row has. They decide shapes, and to read them from a device would
wait for it."""


def to_device(inputs: ModelInputs, device: torch.device) -> dict[str, Tensor]:
    """The chunk on `device`, but for HOST_INPUTS."""
    return {
        name: tensor if name in HOST_INPUTS else tensor.to(device, non_blocking=True)
        for name, tensor in inputs.items()
    }


Encoded = Mapping[str, Tensor]
"""What the model says of the rows of a chunk: named float tensors whose first axis is the row. "embedding",
(B, M, D) unit vectors, is always there."""


class ProcessItems(Protocol):
    """Items -> inputs of one chunk (`agff.processor.ItemProcessor`). Raises `Item.error` of an item it cannot
    represent."""

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        """Inputs of the items as the rows of one chunk."""

    def num_tokens(self, item: Item) -> int:
        """Length of the item's row, known without processing it."""


class SeesPairs(Protocol):
    """What an objective makes of a pair before its items become rows (`agff.objectives.objective`)."""

    def items_of_pair(self, source: str, query: Item, target: Item) -> tuple[Item, Item]:
        """The items to encode, query first."""

    def pair_data_of(self, source: str, query: Item, target: Item) -> Mapping[str, float]:
        """What the objective wants to know of the pair, by name; the same names for every pair."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used."""

    source: str
    reason: str
    """Starts with the address, `shard.tar:key`."""


NO_CONTENT = -1
"""In place of a content id: there is nothing. Real ids are not negative."""


def take_rows(rows: Tensor, index_N: Tensor) -> Tensor:
    """(N, ...) rows[index_N]; the gradients of a row that is taken several times are summed in one order.

    On a CPU the backward of plain indexing sums them in any order, so that no two runs would be equal."""
    return functional.embedding(index_N, rows.reshape(len(rows), -1)).reshape(-1, *rows.shape[1:])


def sum_by_row(items: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """(num_rows, ...) backward of `take_rows`, whose order of summation it has."""
    flat = items.reshape(len(items), -1)
    summed = torch.ops.aten.embedding_dense_backward(flat, index_N, num_rows, -1, False)
    return summed.reshape(num_rows, *items.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The local pairs of one step. The rows of their R = 2 B + N items (queries, targets, explicit negatives)
    are cut into chunks."""

    chunks: tuple[ModelInputs, ...]
    row_of_item_R: Tensor
    """int64: where item i is among the rows of all chunks; items are the B queries, the B targets, the N
    negatives. Items of equal content share a row."""
    query_ids_B: Tensor
    """int64 content ids: equal ids mean equal text and image bytes."""
    target_ids_B: Tensor
    negative_ids_N: Tensor
    """Of the explicit hard negatives, in the order of their pairs; NO_CONTENT where `padded_to` padded."""
    addresses: tuple[str, ...]
    """One `shard.tar:key` a pair."""
    filler: ModelInputs
    """A chunk of one blank row, whose embedding is not used."""
    pair_data: Mapping[str, Tensor] = field(default_factory=dict)
    """What else comes with a pair, by name, for an objective that wants it; first axis B."""
    num_fillers: int = 0
    """How many chunks at the end are `filler`."""
    skipped: tuple[SkippedSample, ...] = ()
    """Samples that could not be used and were redrawn for this batch."""

    def __post_init__(self) -> None:
        num_pairs, num_items = self.num_pairs, 2 * self.num_pairs + self.num_negatives
        if (
            self.target_ids_B.shape[0] != num_pairs
            or len(self.addresses) != num_pairs
            or self.row_of_item_R.shape[0] != num_items
        ):
            raise ValueError(
                f"{num_pairs} query ids, {self.target_ids_B.shape[0]} target ids, {len(self.addresses)} "
                f"addresses, {self.row_of_item_R.shape[0]} items; expected {num_items} items"
            )
        if wrong := [name for name, tensor in self.pair_data.items() if tensor.shape[0] != num_pairs]:
            raise ValueError(f"pair_data {', '.join(wrong)}: first axis must be the {num_pairs} pairs")

    @property
    def num_pairs(self) -> int:
        """B, the pairs of this rank."""
        return self.query_ids_B.shape[0]

    @property
    def num_negatives(self) -> int:
        """N, the explicit negatives of this rank and their padding."""
        return self.negative_ids_N.shape[0]

    def padded_to(self, *, num_chunks: int, num_negatives: int) -> Batch:
        """The same batch with fillers up to that many chunks and negatives, so that all ranks have equally
        many."""
        missing_chunks, missing_negatives = num_chunks - len(self.chunks), num_negatives - self.num_negatives
        if missing_chunks < 0 or missing_negatives < 0:
            raise ValueError(
                f"{len(self.chunks)} chunks, {self.num_negatives} negatives: more than {num_chunks}, "
                f"{num_negatives}"
            )
        return replace(
            self,
            chunks=self.chunks + (self.filler,) * missing_chunks,
            num_fillers=self.num_fillers + missing_chunks,
            # any row: its id keeps it out of the loss
            row_of_item_R=functional.pad(self.row_of_item_R, (0, missing_negatives)),
            negative_ids_N=functional.pad(self.negative_ids_N, (0, missing_negatives), value=NO_CONTENT),
        )

    def split(self, encoded: Encoded) -> tuple[Encoded, Encoded, Encoded]:
        """What the model says of the rows of all chunks -> of the queries, of the targets, of the explicit
        negatives."""
        sizes = [self.num_pairs, self.num_pairs, self.num_negatives]
        sides: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for name, rows in encoded.items():
            items = take_rows(rows, self.row_of_item_R)
            for side, part in zip(sides, items.split(sizes), strict=True):
                side[name] = part
        query, target, negative = sides
        return query, target, negative

    def add_up(self, gradients: Sequence[Tensor], *, num_rows: int) -> Tensor:
        """(num_rows, ...) gradients of the rows of all chunks, from those of the three sides of `split`."""
        items = torch.cat(list(gradients))
        return sum_by_row(items, self.row_of_item_R, num_rows)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by torch's DataLoader."""
        return self.map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its ids, order and pair data on `device`. A chunk moves when it is
        encoded."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        small = ("row_of_item_R", "query_ids_B", "target_ids_B", "negative_ids_N")
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in small}
        return replace(self, **moved, pair_data={name: move(x) for name, x in self.pair_data.items()})

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `move(tensor)` for each tensor, always in the same order."""

        def move_chunk(chunk: ModelInputs) -> ModelInputs:
            return {name: move(tensor) for name, tensor in chunk.items()}

        return replace(
            self,
            chunks=tuple(move_chunk(chunk) for chunk in self.chunks),
            filler=move_chunk(self.filler),
            row_of_item_R=move(self.row_of_item_R),
            query_ids_B=move(self.query_ids_B),
            target_ids_B=move(self.target_ids_B),
            negative_ids_N=move(self.negative_ids_N),
            pair_data={name: move(tensor) for name, tensor in self.pair_data.items()},
        )


@dataclass(frozen=True, kw_only=True)
class TextRule:
    """What is written around what the caller gives. A release carries its own.

    A text that holds the placeholder is complete and stays as it is, and so does a text without an image:
    MMEB's queries without one end in a line break (`Find a photo of a dog\\n`), its targets do not (`a dog`),
    and only the caller knows which of the two a text is.
    """

    image_alone: str = f"{IMAGE_PLACEHOLDER}\nRepresent the given image.\n"
    """The text of an image that has none: that of MMEB's targets."""
    image_with_text: str = f"{IMAGE_PLACEHOLDER}\n{{text}}\n"
    """`{text}` is replaced by the text, without the blanks and line breaks around it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str) or value.count(IMAGE_PLACEHOLDER) != 1:
                raise ConfigError(f"texts.{name}={value!r} must be a text with {IMAGE_PLACEHOLDER} once")
        if self.image_with_text.count("{text}") != 1:
            raise ConfigError(f"texts.image_with_text={self.image_with_text!r} must hold {{text}} once")

    def beside_image(self, text: str) -> str:
        """The complete text of an item with an image."""
        if IMAGE_PLACEHOLDER in text:
            return text
        content = text.strip()
        return self.image_with_text.replace("{text}", content) if content else self.image_alone


MMEB_TEXTS = TextRule()
"""The rule of MMEB's own texts, and of everything that is converted into shards."""


def instructed_text(instruction: str, text: str, *, is_query: bool, has_image: bool) -> str:
    """Instruction and text as one, as MMEB's complete texts have them; a target without an image is its bare
    text."""
    if not is_query and not has_image:
        return text
    parts = (part.replace(IMAGE_PLACEHOLDER, "").strip() for part in (instruction, text))
    content = " ".join(part for part in parts if part)
    if has_image:
        return MMEB_TEXTS.beside_image(content)
    return f"{content}\n" if content else ""


def without_placeholder(text: str) -> str:
    """A text whose item turned out to have no image, as WebQA's queries: the rest of it stays as it is."""
    return text.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "")
