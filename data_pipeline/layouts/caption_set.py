"""Images with captions of their own, for retrieval both ways, and images with references, for captions that a
model writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from data_pipeline.layouts.eval_items import EmbeddedImage, ItemTable, UniqueItems, refuse_all

Image: TypeAlias = str | EmbeddedImage


@dataclass(frozen=True, kw_only=True)
class CaptionSet(ItemTable):
    """Images and their captions, as indexes of `items`, which holds nothing twice.

    An image that several rows name is one image with the captions of all of them. A caption that two images
    have is one candidate, right for both, and one query for each of them.
    """

    captions: tuple[tuple[int, int], ...]
    """(text, image) of each caption, in the order of the table."""
    note: str | None = None
    """A sentence that must appear wherever the scores are printed."""
    num_captions_left_out: int = 0
    num_images_left_out: int = 0

    @property
    def images(self) -> tuple[int, ...]:
        """Each once, in order of appearance."""
        return tuple(dict.fromkeys(image for _, image in self.captions))

    @property
    def texts(self) -> tuple[int, ...]:
        """Each once, in order of appearance."""
        return tuple(dict.fromkeys(text for text, _ in self.captions))

    @property
    def used(self) -> tuple[int, ...]:
        """The items of all captions, in order."""
        return tuple(sorted({*self.images, *self.texts}))

    def without(self, gone: Collection[int]) -> CaptionSet:
        """The set as it is scored when these items cannot be used: captions of theirs are left out, and so is
        an image without any. Nothing remains of fewer than two images."""
        kept = tuple((text, image) for text, image in self.captions if text not in gone and image not in gone)
        if len({image for _, image in kept}) < 2:
            kept = ()
        smaller = replace(self, captions=kept)
        return replace(
            smaller,
            num_captions_left_out=self.num_captions_left_out + len(self.captions) - len(kept),
            num_images_left_out=self.num_images_left_out + len(self.images) - len(smaller.images),
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceSet(ItemTable):
    """Images, as indexes of `items`, and what people wrote of each of them."""

    references: tuple[tuple[int, tuple[str, ...]], ...]
    """(image, at least one caption)."""
    note: str | None = None
    num_images_left_out: int = 0

    @property
    def used(self) -> tuple[int, ...]:
        """The images."""
        return tuple(image for image, _ in self.references)

    def without(self, gone: Collection[int]) -> ReferenceSet:
        """The set without these images; nothing remains of fewer than two (CIDEr-D's weights are 0 then)."""
        kept = tuple(entry for entry in self.references if entry[0] not in gone)
        num_gone = len(self.references) - len(kept)
        return replace(
            self,
            references=kept if len(kept) > 1 else (),
            num_images_left_out=self.num_images_left_out + num_gone,
        )


def caption_set(
    name: str,
    rows: Iterable[tuple[str, Image, Sequence[str]]],
    *,
    image_roots: Sequence[Path],
    expected: tuple[int, int] | None = None,
    image_text: str = MMEB_TEXTS.image_alone,
    note: str | None = None,
) -> CaptionSet:
    """A set of (address, image, captions). No image has been opened; what is missing is among the `findings`.

    expected: images and captions of the published set; the note says where they differ.
    Raises DataError with the address of each row without a caption, or for fewer than two images.
    """
    items = UniqueItems(tuple(image_roots))
    captions: list[tuple[int, int]] = []
    findings = []
    for address, image, texts in rows:
        if not texts or not image:
            findings.append(f"{address}: {'no caption' if image else 'no image'}")
            continue
        image_item = items.add("image", None, image_text, image, address)
        captions += [(items.add("caption", None, text, None, address), image_item) for text in texts]
    refuse_all(findings, remedy="")
    num_images = len({image for _, image in captions})
    if num_images < 2:
        raise DataError(f"{name}: {num_images} images; retrieval needs at least two")
    if expected is not None and (num_images, len(captions)) != expected:
        note = (
            f"{name} has {num_images:,} images and {len(captions):,} captions here, the published set "
            f"{expected[0]:,} and {expected[1]:,}: published scores are not for these."
        )
    return CaptionSet(
        name=name,
        items=items.items,
        addresses=items.addresses,
        findings=items.findings,
        captions=tuple(captions),
        note=note,
    )


def reference_set(captions: CaptionSet) -> ReferenceSet:
    """The images of a set with their captions as references. Raises DataError for an image without words."""
    references: dict[int, list[str]] = {image: [] for image in captions.images}
    for text, image in captions.captions:
        if text not in captions.findings:
            references[image].append(captions.items[text].text)
    refuse_all(
        [f"{captions.addresses[image]}: no caption" for image, texts in references.items() if not texts],
        remedy="",
    )
    return ReferenceSet(
        name=captions.name,
        items=captions.items,
        addresses=captions.addresses,
        findings=captions.findings,
        references=tuple((image, tuple(texts)) for image, texts in references.items()),
        note=captions.note,
    )
