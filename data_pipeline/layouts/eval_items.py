"""The items of an evaluation set: each once, with the row that names it first and what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from agff.batch import MMEB_TEXTS, Item, instructed_text, text_problem, without_placeholder
from agff.errors import DataError
from agff.images import FORMATS, decode_image, open_image, read_header, read_image_file
from data_pipeline.boxes import Box, cut_box

MOST_LINES = 100
"""Findings that are printed; a wrong folder makes hundreds of thousands of them."""


@dataclass(frozen=True)
class EmbeddedImage:
    """An image whose bytes are in the table. Equal bytes are one image, whatever their names."""

    content: bytes = field(repr=False)
    name: str = field(compare=False)


@dataclass(frozen=True)
class EvalItem:
    """One thing to embed, its image not opened yet. Equal items are encoded once."""

    text: str
    image: Path | EmbeddedImage | None = None
    box: Box | None = None
    """The region of the image that is meant; None: the whole image. It is cut at the image's sides."""

    def load(self, opened: MutableMapping[Any, Image.Image]) -> Item:
        """The item with its image decoded, and its name as the address of errors. Raises DataError.

        opened: images that were decoded before; this one is added.
        """
        if self.image is not None and self.image not in opened:
            opened[self.image] = (
                decode_image(self.image.content, self.name, formats=FORMATS)
                if isinstance(self.image, EmbeddedImage)
                else open_image(self.image, self.name)
            )
        return self._with(opened[self.image] if self.image is not None else None)

    def outline(self) -> Item:
        """The item with a blank image of its size. Raises DataError, and OSError when the file system
        fails."""
        image = self.image.content if isinstance(self.image, EmbeddedImage) else self.image
        size = read_header(image, self.name, formats=FORMATS).size if image is not None else None
        return self._with(Image.new("1", size) if size else None)

    def _with(self, image: Image.Image | None) -> Item:
        box = cut_box(self.box, image.size) if self.box is not None and image is not None else None
        return Item(text=self.text, image=image, address=self.name, box=box)

    def digest(self) -> bytes:
        """Hash of the item's content: equal ones mean equal text, image bytes and region. Raises DataError,
        and OSError when the file system fails."""
        content = self.image.content if isinstance(self.image, EmbeddedImage) else None
        if isinstance(self.image, Path):
            content = read_image_file(self.image, self.name)
        parts = (self.text.encode(), content, repr(self.box).encode())
        digests = [hashlib.sha256(part).digest() if part is not None else b"" for part in parts]
        return hashlib.sha256(b"|".join(digests)).digest()

    @property
    def name(self) -> str:
        """What errors call it, beside the row: its image's file, else "text"."""
        if self.image is None:
            return "text"
        return self.image.name if isinstance(self.image, EmbeddedImage) else str(self.image)


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """Items by number."""

    name: str
    items: tuple[EvalItem, ...]
    addresses: tuple[str, ...]
    """Per item the row that names it first, `SET/FILE:row N`."""
    findings: Mapping[int, str]
    """{item: why it cannot be used}, found without opening its image."""

    @property
    def used(self) -> tuple[int, ...]:
        """The items that the scores need, in order."""
        raise NotImplementedError

    def misfit(self, item: int, size: tuple[int, int]) -> str | None:
        """Why an image of this size, upright, is not the one the table speaks of; None when it may be."""
        return None

    def lines(self, findings: Mapping[int, str]) -> list[str]:
        """One line a reason, with the address of the item that has it first: a missing image is one, however
        many texts are beside it."""
        items_of: dict[str, list[int]] = {}
        for item, reason in sorted(findings.items()):
            items_of.setdefault(reason, []).append(item)
        return [
            f"{self.addresses[items[0]]}: {reason}"
            + (f" (and {len(items) - 1:,} more items)" if len(items) > 1 else "")
            for reason, items in items_of.items()
        ]


class UniqueItems:
    """The items of a set so far. A table may name each of them a thousand times; it is checked the first time
    only."""

    def __init__(self, image_roots: tuple[Path, ...]) -> None:
        self._image_roots = image_roots
        self._index: dict[EvalItem, int] = {}
        self._index_of_cell: dict[tuple[str, str | None, str | None, str | EmbeddedImage | None], int] = {}
        self._images: dict[str, tuple[Path, str | None]] = {}
        self._addresses: list[str] = []
        self._findings: dict[int, str] = {}

    @property
    def items(self) -> tuple[EvalItem, ...]:
        """In order of appearance."""
        return tuple(self._index)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of each item."""
        return tuple(self._addresses)

    @property
    def findings(self) -> Mapping[int, str]:
        """{index: reason} of the items that cannot be used."""
        return self._findings

    def add(
        self,
        role: str,
        instruction: str | None,
        text: str | None,
        image: str | EmbeddedImage | None,
        address: str,
    ) -> int:
        """Index of the item that these cells of a row describe.

        role: "qry" or "tgt"; instruction None: the text is complete.
        """
        cell = (role, instruction, text, image)
        if cell not in self._index_of_cell:
            self._index_of_cell[cell] = self._add(role, instruction, text or "", image or "", address)
        return self._index_of_cell[cell]

    def _add(
        self, role: str, instruction: str | None, text: str, image: str | EmbeddedImage, address: str
    ) -> int:
        has_image = bool(image)
        if instruction is not None:
            text = instructed_text(instruction, text, is_query=role == "qry", has_image=has_image)
        text, problem_of_text = _fitting_text(text, has_image=has_image)
        file, problem = self._find(image) if isinstance(image, str) and image else (image or None, None)
        index = self._index.setdefault(EvalItem(text, file), len(self._index))
        if index == len(self._addresses):
            self._addresses.append(address)
            if problem:
                self._findings[index] = problem
            elif problem_of_text:
                self._findings[index] = f"{role}_text: {problem_of_text}"
        return index

    def _find(self, image: str) -> tuple[Path, str | None]:
        if image not in self._images:
            self._images[image] = _find_image(image, self._image_roots)
        return self._images[image]


def _fitting_text(text: str, *, has_image: bool) -> tuple[str, str | None]:
    """(text, None) with the placeholder once beside an image and never without one, or the reason why it
    cannot."""
    if not has_image:
        text = without_placeholder(text)
        return text, None if text.strip() else "it is empty and there is no image"
    text = text or MMEB_TEXTS.image_alone
    return text, text_problem(text, has_image=True)


def _find_image(image: str, roots: tuple[Path, ...]) -> tuple[Path, str | None]:
    """(file, None), or (where it should be, the reason why there is none)."""
    # an image written into the column in base64 is no line to read; its ends tell it from others
    shown = repr(image if len(image) <= 300 else f"{image[:200]}...{image[-80:]}")
    relative = PurePosixPath(image)
    if relative.is_absolute() or ".." in relative.parts or "\0" in image:
        reason = f"image path {shown} leaves the images folder; paths must be relative and inside it"
        return Path(image), reason
    for root in roots:
        path = root / relative
        try:
            if path.is_file():
                return path, None
        except OSError as error:  # a name too long, no permission
            return path, f"image {shown} cannot be read under {root}: {error.strerror}"
    tried = " and ".join(str(root) for root in roots)
    return roots[0] / relative, f"image {shown} not found under {tried}"


def refuse_all(findings: Collection[str], *, remedy: str) -> None:
    """Raise one DataError for all findings, a line each; nothing when there are none."""
    if not findings:
        return
    lines = list(findings)[:MOST_LINES]
    if len(findings) > MOST_LINES:
        lines.append(f"and {len(findings) - MOST_LINES:,} more")
    head = [] if len(findings) == 1 else [f"{len(findings):,} findings"]
    raise DataError("\n  ".join([*head, *lines]) + (f"\n{remedy}" if remedy else ""))
