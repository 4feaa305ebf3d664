"""The page and the lines of a search: escaped, with each picture or the reason why it is not there."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from agff.errors import ConfigError
from launcher.embedding.vectors_folder import VectorItem
from launcher.searching.build import IndexChoice
from launcher.searching.page import hit_line, shown_hits, write_search_page
from launcher.searching.searcher import Hit, Searcher
from tests.launcher.searching.vectors import built, random_vectors, write_vectors

HOSTILE = '<script>alert(1)</script> & "quoted" \x1b[31m\ud83d'
ITEMS = [
    VectorItem(id="a", text=HOSTILE, image=None),
    VectorItem(id="b", text=None, image="one/b.png"),
    VectorItem(id="c", text="both", image="../secret.png"),
    VectorItem(id="d", text=None, image="one/damaged.png"),
    VectorItem(id="e", text=None, image="Shapes/Shapes-00000.tar:000001.png"),
    VectorItem(id=f"{HOSTILE}1", text=None, image="one/b.png"),
    VectorItem(id="g", text=None, image=f"{HOSTILE}.png"),
]
HITS = [Hit(row=row, score=0.55 - row / 10) for row in range(len(ITEMS))]


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def searcher(tmp_path: Path) -> Searcher:
    corpus = tmp_path / "corpus"
    (corpus / "one").mkdir(parents=True)
    Image.new("RGB", (400, 200), "red").save(corpus / "one/b.png")
    Image.new("RGB", (400, 200), "red").save(tmp_path / "secret.png")
    (corpus / "one/damaged.png").write_bytes((corpus / "one/b.png").read_bytes()[:-30])
    vectors = write_vectors(tmp_path / "vectors", random_vectors(len(ITEMS)), items=ITEMS, source=corpus)
    return Searcher(built(vectors, tmp_path / "index", IndexChoice()))


def written(searcher: Searcher, out: Path, *, text: str = "a red heart") -> Page:
    hits = shown_hits(searcher, HITS)
    write_search_page(out, text=text, image=None, hits=hits, facts=[("index", HOSTILE)])
    return Page(out.read_text(encoding="utf-8"))


def test_whatever_an_item_holds_stays_text(searcher: Searcher, tmp_path: Path) -> None:
    page = written(searcher, tmp_path / "page.html", text=HOSTILE)
    assert "script" not in page.tags
    assert page.words.count('<script>alert(1)</script> & "quoted"') == 6  # title, query, items, fact
    assert all(source.startswith("data:image/") for source in page.sources)


def test_each_item_has_its_place_score_and_picture(searcher: Searcher, tmp_path: Path) -> None:
    page = written(searcher, tmp_path / "page.html")
    assert [page.words.count(f"{hit.score:+.4f}") for hit in HITS] == [1] * len(HITS)
    assert len(page.sources) == 2
    assert page.tags.count("li") == len(ITEMS)


def test_a_picture_that_cannot_be_shown_says_why(searcher: Searcher, tmp_path: Path) -> None:
    reasons = [hit.reason for hit in shown_hits(searcher, HITS)]
    nowhere = "no file of this name in the corpus's folder now"
    assert reasons[:3] == ["", "", nowhere]  # it exists, and it is outside
    assert "damaged PNG" in reasons[3]
    assert reasons[4:] == [nowhere, "", nowhere]
    words = " ".join(written(searcher, tmp_path / "page.html").words.split())
    assert f"../secret.png cannot be shown: {nowhere}" in words


def test_the_query_s_image_is_shown(searcher: Searcher, tmp_path: Path) -> None:
    image = Image.new("RGB", (50, 50), "blue")
    write_search_page(tmp_path / "page.html", text="", image=image, hits=[], facts=[])
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.sources) == 1
    assert "Search: an image" in page.words


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--html .*none/page.html: cannot write the page"):
        write_search_page(tmp_path / "none/page.html", text="", image=None, hits=[], facts=[])


def test_a_line_holds_nothing_that_moves_the_terminal() -> None:
    line = hit_line(3, Hit(row=0, score=0.41), VectorItem(id="a\nb", text=HOSTILE + "x" * 200, image=None))
    assert line.startswith('  3.  +0.4100  a b  <script>alert(1)</script> & "quoted"')
    assert line.isprintable()
    assert line.encode()
    assert len(line) < 150


def test_a_line_names_an_image_once() -> None:
    item = VectorItem(id="one/b.png", text=None, image="one/b.png")
    assert hit_line(12, Hit(row=0, score=-0.5), item) == " 12.  -0.5000  one/b.png"
