"""The distinct queries and targets of rows of training data (data_pipeline/layouts/mmeb_train.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.corpora.corpus import CorpusItem, Unusable, fingerprint_of, image_name, place_of
from data_pipeline.layouts.training_rows import Pair, Side

SIDES = ("query", "target")


@dataclass(frozen=True, kw_only=True)
class PairItems:
    """Each distinct text with image once, in the order of the rows: `SUBSET/row:query`, `SUBSET/row:target`
    of the row that has it first."""

    name: str
    """Of the subset."""
    entries: tuple[CorpusItem | Unusable, ...]
    query_of_row: tuple[int, ...]
    """Per row the entry of its query; -1 where the row cannot be used or the side was not wanted."""
    target_of_row: tuple[int, ...]
    tables: tuple[str, ...]
    """SHA-256 of the files."""
    images: str
    """Where the images are, seen from the folder of the tables."""

    @property
    def num_items(self) -> int:
        """See Corpus."""
        return len(self.entries)

    @property
    def fingerprint(self) -> str:
        """See Corpus."""
        return fingerprint_of("pairs", self.tables, [entry.id for entry in self.entries], self.images)

    def read(self, start: int, stop: int) -> Iterator[CorpusItem | Unusable]:
        """See Corpus."""
        return iter(self.entries[start:stop])


def pair_items(
    name: str,
    rows: Iterable[Pair | str],
    *,
    sides: Sequence[str],
    folder: Path,
    images: Path,
    tables: Sequence[str],
) -> PairItems:
    """Read all rows. sides: of SIDES, those that become items. folder: of the corpus. images: their folder. A
    row that cannot be used is an entry with its reason."""
    entries: list[CorpusItem | Unusable] = []
    known: dict[Side, int] = {}
    of_row: dict[str, list[int]] = {side: [] for side in SIDES}
    for number, row in enumerate(rows):
        if isinstance(row, str):
            entries.append(Unusable(id=f"{name}/{number}", reason=row))
        for role in SIDES:
            place = -1
            if isinstance(row, Pair) and role in sides:
                side = Side(text=getattr(row, role).text, image=getattr(row, role).image)
                if side not in known:
                    known[side] = len(entries)
                    entries.append(_entry(f"{name}/{number}:{role}", side, folder))
                place = known[side]
            of_row[role].append(place)
    return PairItems(
        name=name,
        entries=tuple(entries),
        query_of_row=tuple(of_row["query"]),
        target_of_row=tuple(of_row["target"]),
        tables=tuple(tables),
        images=place_of(images, folder),
    )


def _entry(name: str, side: Side, folder: Path) -> CorpusItem:
    found = image_name(side.image, folder) if isinstance(side.image, Path) else None
    return CorpusItem(id=name, text=side.text, image=side.image, image_name=found)
