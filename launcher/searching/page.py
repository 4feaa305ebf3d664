"""What was found, as lines for a terminal and as one self-contained HTML page with the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from agff.errors import DataError
from agff.images import open_image
from launcher.embedding.vectors_folder import VectorItem
from launcher.pages.pictures import Thumbnail, make_thumbnail
from launcher.pages.templates import write_page
from launcher.searching.searcher import Hit, Searcher

TEMPLATE = "searching/page.html.j2"
MOST_CHARACTERS = 100
"""Of a text, in a line of the terminal."""


@dataclass(frozen=True, kw_only=True)
class ShownHit:
    """What the page shows of an item."""

    place: int
    score: float
    id: str
    text: str
    image: str
    """Its path as the corpus names it; empty without an image."""
    thumbnail: Thumbnail | None = None
    reason: str = ""
    """Why the image cannot be shown."""


def hit_line(place: int, hit: Hit, item: VectorItem) -> str:
    """One line, whatever the corpus holds: no control characters reach the terminal."""
    parts = dict.fromkeys((item.id, item.text or "", item.image or ""))
    shown = [_printable(part) for part in parts if part]
    return f"{place:>3}.  {hit.score:+.4f}  " + "  ".join(
        part if len(part) <= MOST_CHARACTERS else f"{part[:MOST_CHARACTERS]}..." for part in shown
    )


def shown_hits(searcher: Searcher, hits: Sequence[Hit]) -> list[ShownHit]:
    """The items with their pictures; one that cannot be shown says why."""
    return [_shown(searcher, place, hit) for place, hit in enumerate(hits, start=1)]


def write_search_page(
    out: Path,
    *,
    text: str,
    image: Image | None,
    hits: Sequence[ShownHit],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write the page. Raises ConfigError when it cannot be written.

    text, image: of the query. facts: name and value of what a reader should know about the search.
    """
    write_page(
        out,
        TEMPLATE,
        option="--html",
        title=_one_line(text) or "an image",
        query_text=text,
        query_thumbnail=make_thumbnail(image) if image is not None else None,
        hits=hits,
        facts=facts,
    )


def _shown(searcher: Searcher, place: int, hit: Hit) -> ShownHit:
    item = searcher.vectors.item(hit.row)
    thumbnail, reason = None, ""
    if item.image is not None:
        path = searcher.vectors.image_file(item)
        if path is None:
            reason = "no file of this name in the corpus's folder now"
        else:
            try:
                thumbnail = make_thumbnail(open_image(path, item.image))
            except DataError as error:
                reason = str(error)
    return ShownHit(
        place=place,
        score=hit.score,
        id=item.id,
        text=item.text or "",
        image=item.image or "",
        thumbnail=thumbnail,
        reason=reason,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in _one_line(text))
