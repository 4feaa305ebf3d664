"""What a subset offers to its queries: each distinct target once, and which of them are a query's answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.corpora.corpus import CorpusItem
from data_pipeline.corpora.pairs import PairItems
from data_pipeline.layouts.eval_items import EvalItem


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Of one subset. A row is one of its table; a vector is one of its folder of vectors."""

    rows: tuple[int, ...]
    """That have a query and a target with vectors; the others get no negatives."""
    query: NDArray[np.int64]
    """(R,) vector of each of these rows' query."""
    positive: NDArray[np.int64]
    """(R,) candidate that is the row's own target."""
    answers: tuple[tuple[int, ...], ...]
    """(R,) candidates that are targets of a row with an equal query, or equal to the query itself."""
    vectors: NDArray[np.int64]
    """(C,) vector of each candidate."""
    first_row: NDArray[np.int64]
    """(C,) the first row of the table that has it as its target."""


def candidates_of(pairs: PairItems, vector_of: Mapping[int, int]) -> Candidates:
    """vector_of: entry of the pairs -> its vector; entries without one are absent.

    Items of equal text and image bytes are one, whatever the names of their files, and so are texts that
    differ in case and blanks: `Yes` is no negative of `yes`. Raises DataError or OSError for an image that
    cannot be read any more.
    """
    content = _contents(pairs, vector_of)
    rows = [
        row
        for row, (query, target) in enumerate(zip(pairs.query_of_row, pairs.target_of_row, strict=True))
        if query in vector_of and target in vector_of
    ]
    number: dict[int, int] = {}
    vectors: list[int] = []
    first_row: list[int] = []
    answers: dict[int, dict[int, None]] = defaultdict(dict)
    for row in rows:
        target = content[pairs.target_of_row[row]]
        if target not in number:
            number[target] = len(vectors)
            vectors.append(vector_of[target])
            first_row.append(row)
        answers[content[pairs.query_of_row[row]]][number[target]] = None
    for query in answers:
        if query in number:  # the query itself is a target of other rows
            answers[query][number[query]] = None
    return Candidates(
        rows=tuple(rows),
        query=np.array([vector_of[pairs.query_of_row[row]] for row in rows], dtype=np.int64),
        positive=np.array([number[content[pairs.target_of_row[row]]] for row in rows], dtype=np.int64),
        answers=tuple(tuple(answers[content[pairs.query_of_row[row]]]) for row in rows),
        vectors=np.array(vectors, dtype=np.int64),
        first_row=np.array(first_row, dtype=np.int64),
    )


def _contents(pairs: PairItems, vector_of: Mapping[int, int]) -> dict[int, int]:
    """Entry -> the first entry of equal content. Images are read where text and size leave a doubt."""
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    texts: dict[str, int] = {}
    first: dict[int, int] = {}
    for place in sorted(vector_of):
        entry = pairs.entries[place]
        assert isinstance(entry, CorpusItem), "what has a vector"
        if isinstance(entry.image, Path):
            alike[_plain(entry), entry.image.stat().st_size].append(place)
        else:
            first[place] = texts.setdefault(_plain(entry), place)
    for places in alike.values():
        first |= _of_equal_bytes(pairs, places)
    return first


def _of_equal_bytes(pairs: PairItems, places: Sequence[int]) -> dict[int, int]:
    if len(places) == 1:
        return {places[0]: places[0]}
    known: dict[bytes, int] = {}
    found = {}
    for place in places:
        entry = pairs.entries[place]
        assert isinstance(entry, CorpusItem), "what has a vector"
        found[place] = known.setdefault(EvalItem(_plain(entry), entry.image).digest(), place)
    return found


def _plain(entry: CorpusItem) -> str:
    """The text without case, and with single blanks."""
    return " ".join((entry.text or "").casefold().split())
