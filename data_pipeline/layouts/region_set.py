"""Images with regions that somebody described -> region sets, for retrieval of regions by their phrases.

A set's folder holds files in the layouts of data_pipeline/layouts/image_regions.py, which training reads too:
rows of {image, regions}, Visual Genome's region descriptions, or RefCOCO's references. All files of the first
two are one set; every split of RefCOCO's references but `train` is a set of its own. Images are looked for in
the folder's images/ and in the folder.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from data_pipeline.boxes import Box, box_problem
from data_pipeline.layouts.eval_items import EmbeddedImage, ItemTable, UniqueItems, refuse_all
from data_pipeline.layouts.image_regions import ImageRegions
from data_pipeline.layouts.refcoco import INSTANCES_FILE, refcoco_splits
from data_pipeline.layouts.training_rows import RegionRow

_SUFFIXES = (".parquet", ".json", ".jsonl", ".p", ".pkl", ".pickle")
_EXPECTED = (
    "*.parquet, *.json or *.jsonl of {image, regions}, Visual Genome's region_descriptions.json, or "
    "RefCOCO's refs(...) beside instances.json"
)


@dataclass(frozen=True, kw_only=True)
class RegionSet(ItemTable):
    """Regions, each once, and the phrases that describe them."""

    regions: tuple[tuple[int, Box], ...]
    """(image, box)."""
    phrases: tuple[tuple[int, int], ...]
    """(text, index of its region), as the tables have them."""
    num_regions_left_out: int = 0
    num_phrases_left_out: int = 0
    """Of those that differ, as they are asked."""
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """{image: its size}, where the source says of which size its boxes are."""
    note: str | None = None

    @property
    def used(self) -> tuple[int, ...]:
        """Images and phrases, in order."""
        images = {image for image, _ in self.regions}
        return tuple(sorted(images | {text for text, _ in self.phrases}))

    def without(self, gone: Collection[int]) -> RegionSet:
        """The set as it is scored when these items cannot be used: a region is left out with its image, and
        where none of its phrases remains. Nothing remains of fewer than two regions."""
        phrases = [
            (text, region)
            for text, region in self.phrases
            if text not in gone and self.regions[region][0] not in gone
        ]
        kept = sorted({region for _, region in phrases})
        if len(kept) < 2:
            phrases, kept = [], []
        num_phrases = len({text for text, _ in self.phrases}) - len({text for text, _ in phrases})
        number = {region: position for position, region in enumerate(kept)}
        return replace(
            self,
            regions=tuple(self.regions[region] for region in kept),
            phrases=tuple((text, number[region]) for text, region in phrases),
            num_regions_left_out=self.num_regions_left_out + len(self.regions) - len(kept),
            num_phrases_left_out=self.num_phrases_left_out + num_phrases,
        )

    def misfit(self, item: int, size: tuple[int, int]) -> str | None:
        """The first box of an image that is no part of it, by the rule of training; or another size than the
        source says."""
        name = self.items[item].name
        if (said := self.sizes.get(item, size)) != size:
            return (
                f"{name}: has {size[0]} x {size[1]} pixels, its boxes are of one of {said[0]} x {said[1]}; "
                "they must be in pixels of the upright image"
            )
        found = (box_problem(box, size) for box in self._boxes.get(item, ()))
        return next((f"{name}: {problem}" for problem in found if problem), None)

    @functools.cached_property
    def _boxes(self) -> dict[int, list[Box]]:
        """By image: Visual Genome has 108,000 images with 5,400,000 regions."""
        found: dict[int, list[Box]] = {}
        for image, box in self.regions:
            found.setdefault(image, []).append(box)
        return found


@dataclass(frozen=True, kw_only=True)
class RegionSource:
    """Where a set is."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    split: str = "train"
    """Of RefCOCO's references."""

    def rows(self) -> Iterator[tuple[str, RegionRow | str]]:
        """(address, an image with its regions or why there is none) of each row of all files."""
        for path in self.files:
            layout = ImageRegions(root=path, images=self.images, name=self.name, split=self.split)
            count = layout.count_rows(self.name)
            for number, row in enumerate(layout.rows(self.name, start=0, stop=count)):
                yield f"{self.folder.name}/{path.name}:row {number}", row

    @property
    def images(self) -> Path:
        """Folder of the images."""
        inside = self.folder / "images"
        return inside if inside.is_dir() else self.folder


def find_region_sets(root: Path) -> list[RegionSource]:
    """The sets of `root` itself, else those of the folders in it. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (--regions)")
    folders = [root] if _files(root) else sorted(path for path in root.iterdir() if path.is_dir())
    found = [source for folder in folders for source in _sources(folder)]
    if not found:
        raise DataError(f"{root}: holds no region set: {_EXPECTED} (--regions)")
    return found


def read_region_set(source: RegionSource) -> RegionSet:
    """One set. No image has been opened; missing ones are among the `findings`.

    Raises DataError with the address of each row and region that is wrong in itself.
    """
    items = UniqueItems((source.images, source.folder))
    numbers: dict[tuple[int, Box], int] = {}
    phrases: list[tuple[int, int]] = []
    sizes: dict[int, tuple[int, int]] = {}
    wrong: list[str] = []
    for address, row in source.rows():
        if isinstance(row, str):
            wrong.append(f"{address}: {row}")
            continue
        image: str | EmbeddedImage = (
            row.image if isinstance(row.image, EmbeddedImage) else str(row.image.relative_to(source.images))
        )
        image_item = items.add("image", None, MMEB_TEXTS.image_alone, image, address)
        if row.size is not None:
            sizes[image_item] = row.size
        for entry in row.regions:
            if isinstance(entry, str):
                wrong.append(f"{address}: {entry}")
                continue
            region = numbers.setdefault((image_item, entry.box), len(numbers))
            phrases.append((items.add("phrase", None, entry.phrase, None, address), region))
    refuse_all(wrong, remedy="")
    if len(numbers) < 2:
        raise DataError(f"{source.folder}: {len(numbers)} regions; retrieval needs at least two")
    return RegionSet(
        name=source.name,
        items=items.items,
        addresses=items.addresses,
        findings=items.findings,
        regions=tuple(numbers),
        phrases=tuple(phrases),
        sizes=sizes,
    )


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _SUFFIXES and path.name != INSTANCES_FILE and path.is_file()
    )


def _sources(folder: Path) -> list[RegionSource]:
    files = _files(folder)
    refs = [path for path in files if _is_refcoco(path)]
    others = tuple(path for path in files if path not in refs)
    found = [RegionSource(name=folder.name, folder=folder, files=others)] if others else []
    for path in refs:
        name = f"{folder.name} {path.stem}" if len(refs) > 1 else folder.name
        found += [
            RegionSource(name=f"{name} {split}", folder=folder, files=(path,), split=split)
            for split in refcoco_splits(path)
            if split != "train"
        ]
    return found


def _is_refcoco(path: Path) -> bool:
    return ImageRegions(root=path, images=path.parent, name=path.stem).kind == "refcoco"
