"""SugarCrepe's layout -> images with a right and a wrong caption each.

`<subset>.json` = {key: {filename, caption, negative_caption}} for its seven subsets, in the folder or in its
data/; the keys have gaps. Images are those of COCO's val2017.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from data_pipeline.layouts.eval_items import ItemTable, UniqueItems, refuse_all
from data_pipeline.layouts.json_rows import read_json

SUBSETS = {
    "replace_obj": 1_652,
    "replace_att": 788,
    "replace_rel": 1_406,
    "swap_obj": 245,
    "swap_att": 666,
    "add_obj": 2_062,
    "add_att": 692,
}
"""Pairs of each published subset; the first word is the group whose mean is reported."""
_FIELDS = ("filename", "caption", "negative_caption")
_IMAGE_FOLDERS = ("val2017", "images/val2017", "images", ".", "../val2017", "../images/val2017")


@dataclass(frozen=True, kw_only=True)
class CaptionChoice:
    """An image, its caption and a wrong one that differs in one respect, as indexes of items."""

    subset: str
    image: int
    caption: int
    negative: int

    @property
    def items(self) -> tuple[int, int, int]:
        """All three."""
        return self.image, self.caption, self.negative


@dataclass(frozen=True, kw_only=True)
class ChoiceSet(ItemTable):
    """All choices, subset by subset."""

    choices: tuple[CaptionChoice, ...]
    left_out: tuple[CaptionChoice, ...] = ()
    note: str | None = None

    @property
    def used(self) -> tuple[int, ...]:
        """The items of the choices, in order."""
        return tuple(sorted({item for choice in self.choices for item in choice.items}))

    def without(self, gone: Collection[int]) -> ChoiceSet:
        """The set as it is scored when these items cannot be used: a choice is left out with any of its
        three, and the note says of which subsets nothing remains."""
        hit = [choice for choice in self.choices if any(item in gone for item in choice.items)]
        kept = tuple(choice for choice in self.choices if not any(item in gone for item in choice.items))
        empty = {choice.subset for choice in self.choices} - {choice.subset for choice in kept}
        notes = [] if self.note is None else [self.note]
        if kept and empty:
            notes.append(
                f"{self.name}: nothing remains of {', '.join(sorted(empty))}; a mean without all of its "
                "subsets is not given."
            )
        note = " ".join(notes) or None
        return replace(self, choices=kept, left_out=(*self.left_out, *hit), note=note)


def sugarcrepe_files(folder: Path) -> dict[str, Path]:
    """{subset: its file} of those that are there."""
    places = (folder, folder / "data")
    found = {subset: [place / f"{subset}.json" for place in places] for subset in SUBSETS}
    return {
        subset: next(path for path in paths if path.is_file())
        for subset, paths in found.items()
        if any(path.is_file() for path in paths)
    }


def read_sugarcrepe(folder: Path, *, images_root: Path | None) -> ChoiceSet:
    """All seven subsets. No image has been opened; missing ones are among the `findings`.

    Raises DataError with the address of each entry that is wrong, and for subsets that are not there.
    """
    files = sugarcrepe_files(folder)
    if missing := [f"{subset}.json" for subset in SUBSETS if subset not in files]:
        raise DataError(
            f"{folder}: SugarCrepe without {', '.join(missing)}; its scores are means over all seven "
            "subsets, finish the download"
        )
    items = UniqueItems((images_root,) if images_root else tuple(folder / name for name in _IMAGE_FOLDERS))
    choices, findings = [], []
    for subset, path in files.items():
        for key, entry in _entries(path):
            address = f"{folder.name}/{path.name}:{key}"
            if problem := _problem(entry):
                findings.append(f"{address}: {problem}")
                continue
            image = items.add("image", None, MMEB_TEXTS.image_alone, entry["filename"], address)
            texts = (items.add("caption", None, entry[name], None, address) for name in _FIELDS[1:])
            caption, negative = texts
            choices.append(CaptionChoice(subset=subset, image=image, caption=caption, negative=negative))
    refuse_all(findings, remedy="")
    counts = {subset: sum(choice.subset == subset for choice in choices) for subset in SUBSETS}
    return ChoiceSet(
        name="SugarCrepe",
        items=items.items,
        addresses=items.addresses,
        findings=items.findings,
        choices=tuple(choices),
        note=None if counts == SUBSETS else _note(counts),
    )


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: expected {{key: {{{', '.join(_FIELDS)}}}}}, found {content!r:.60}")
    return iter(content.items())


def _problem(entry: Any) -> str | None:
    is_right = isinstance(entry, dict) and all(
        isinstance(entry.get(name), str) and entry[name].strip() for name in _FIELDS
    )
    if not is_right:
        return f"expected {{{', '.join(_FIELDS)}}} with texts, found {entry!r:.80}"
    if entry["caption"] == entry["negative_caption"]:
        return f"caption and negative_caption are both {entry['caption']!r:.80}"
    return None


def _note(counts: dict[str, int]) -> str:
    differing = ", ".join(
        f"{subset} {count:,} ({SUBSETS[subset]:,})"
        for subset, count in counts.items()
        if count != SUBSETS[subset]
    )
    return (
        f"SugarCrepe has other pairs here than the published set (in brackets): {differing}; published "
        "scores are not for these."
    )
