"""The report's page: complete, self-contained, the same bytes every time."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from agff.errors import ConfigError
from data_pipeline.layouts.caption_set import CaptionSet, ReferenceSet
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmeb_sets import SetInfo
from data_pipeline.layouts.region_set import RegionSet
from launcher.evaluation import scores_file
from launcher.pages.pictures import THUMBNAIL_PX
from launcher.reporting import gallery as gallery_module
from launcher.reporting.gallery import Gallery
from launcher.reporting.page import check_report, write_report
from tests.launcher.colours import COLOURS, ColourModel, table_of
from tests.launcher.html_pages import Element, read_page
from tests.launcher.reporting.results import results_of

BOX = (0.0, 0.0, 200.0, 200.0)


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """Of a model that takes green for red: a set of each kind that is drawn in another way."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (400, 300), colour).save(tmp_path / f"{name}.png")
    images = [f"<|image_1|>\nRepresent the given image.\n@{tmp_path / name}.png" for name in COLOURS]
    table = table_of("Find <i>red</i>\n", "Find <i>green</i>\n", "Find <i>blue</i>\n", *images)
    info = SetInfo(meta_task="retrieval", in_distribution=True)
    colours = torch.eye(3)[:, None]
    said = torch.cat([colours[[0, 0, 2]], colours])
    candidates = ((3, 4, 5), (4, 3, 5), (5, 3, 4))
    found = Gallery()
    model = ColourModel()
    found.look(model, EvalSet(**table, info=info, queries=(0, 1, 2), candidates=candidates), said)
    captions = {**table, "name": "Captions"}
    found.look(model, CaptionSet(**captions, captions=((0, 3), (1, 4), (2, 5))), said)
    regions = {**table, "name": "Regions"}
    vectors = {0: said[0], 1: said[1], (3, BOX): said[3], (4, BOX): said[4]}
    found.look(model, RegionSet(**regions, regions=((3, BOX), (4, BOX)), phrases=((0, 0), (1, 1))), vectors)
    references = {**table, "name": "Written"}
    found.look(
        model, ReferenceSet(**references, references=((3, ("red",)), (4, ("<u>",)))), {3: "<s>", 4: ""}
    )
    return found


def page_of(gallery: Gallery, out: Path, *compared: Path) -> Element:
    write_report(out, model=Path("releases/mine"), results=results_of(), gallery=gallery, compared=compared)
    return read_page(out)


def test_mistakes_are_shown_with_their_pictures_and_places(gallery: Gallery, tmp_path: Path) -> None:
    page = page_of(gallery, tmp_path / "r.html")
    cards = page.all("article", "card")
    assert [card.attributes["aria-label"] for card in cards] == [
        "mistake 1 of S",
        "mistake 1 of Captions",
        "mistake 1 of Regions",
        "caption 1 of Written",
        "caption 2 of Written",
    ]
    first = cards[0]
    assert "right 0.000, place 3 of 3; wrong 1.000" in first.text
    assert first.one("figure", "query").one("p", "words").text == "Find <i>green</i>"
    right, wrong = first.one("figure", "right"), first.one("figure", "wrong")
    assert (right.one("p", "called").text, wrong.one("p", "called").text) == (
        "“<i>green</i>”",
        "“<i>red</i>”",
    )
    for figure, colour in ((right, (0, 255, 0)), (wrong, (255, 0, 0))):
        content = base64.b64decode((figure.one("img").attributes["src"] or "").partition(",")[2])
        with Image.open(io.BytesIO(content)) as picture:
            assert max(picture.size) == THUMBNAIL_PX
            found = picture.convert("RGB").getpixel((96, 72))
        assert found == pytest.approx(colour, abs=4)
    assert "The model: <s>" in cards[3].text
    assert "A person: <u>" in cards[4].text


def test_neighbours_are_images_and_texts_nearest_first(gallery: Gallery, tmp_path: Path) -> None:
    near = page_of(gallery, tmp_path / "r.html").all("div", "near")[0]
    item, *images = near.all("figure")
    assert item.one("img").attributes["alt"] == "<i>red</i>"
    assert [figure.one("figcaption").text for figure in images] == ["0.000", "0.000"]
    assert [line.text for line in near.all("li")] == [
        "Find <i>red</i> 1.000",
        "Find <i>green</i> 1.000",
        "Find <i>blue</i> 0.000",
    ]


def test_the_page_needs_nothing_from_elsewhere_and_is_accessible(gallery: Gallery, tmp_path: Path) -> None:
    page = page_of(gallery, tmp_path / "r.html")
    assert [tag for tag in ("script", "link", "iframe", "object") if page.all(tag)] == []
    assert "url(" not in page.one("style").text
    assert all((image.attributes["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert all(image.attributes["alt"] for image in page.all("img"))
    [policy] = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for table in page.all("table"):
        assert all(head.attributes["scope"] in ("col", "row") for head in table.all("th"))
        assert [len(row.all("th")) for row in table.one("tbody").all("tr")] == [1] * len(
            table.one("tbody").all("tr")
        )
    places = {heading.attributes.get("id") for heading in page.all("h2")}
    assert {(link.attributes["href"] or "").removeprefix("#") for link in page.all("a")} == places
    levels = [int(tag[1]) for tag in headings(page)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert "prefers-color-scheme: dark" in page.one("style").text
    assert "these <b>imitate</b> the format." in [note.text for note in page.all("p", "note")]
    assert page.all("b") == []


def headings(element: Element) -> list[str]:
    found = []
    for child in element.children:
        if isinstance(child, Element):
            found += [child.tag] if child.tag in ("h1", "h2", "h3", "h4") else []
            found += headings(child)
    return found


def test_equal_input_gives_equal_bytes_and_no_date(gallery: Gallery, tmp_path: Path) -> None:
    page_of(gallery, tmp_path / "a.html")
    page_of(gallery, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "2026" not in (tmp_path / "a.html").read_text()


def test_pictures_beyond_the_limit_are_left_out_and_counted(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = read_page_size(gallery, tmp_path)
    monkeypatch.setattr(gallery_module, "MAX_PICTURE_BYTES", 1_000)
    small = Gallery()
    table = table_of("Find red\n", *(f"<|image_1|>\n@{tmp_path / name}.png" for name in COLOURS))
    info = SetInfo(meta_task="retrieval", in_distribution=True)
    said = torch.eye(3)[[0, 1, 0, 2]][:, None]
    small.look(ColourModel(), EvalSet(**table, info=info, queries=(0,), candidates=((1, 2, 3),)), said)
    page = page_of(small, tmp_path / "r.html")
    shown = [image.attributes["src"] or "" for image in page.all("img")]
    assert 0 < len("".join(shown)) <= 1_000
    assert small.num_left_out == 5 - len(shown)
    assert f"{small.num_left_out} pictures are left out" in page.text
    assert (tmp_path / "r.html").stat().st_size < everything


def read_page_size(gallery: Gallery, folder: Path) -> int:
    page_of(gallery, folder / "all.html")
    return (folder / "all.html").stat().st_size


def test_other_scores_are_columns_beside(gallery: Gallery, tmp_path: Path) -> None:
    for folder, score in (("first", 30.0), ("second", 40.0)):
        write_scores(tmp_path / folder / "scores.json", score)
    page = page_of(gallery, tmp_path / "r.html", tmp_path / "first", tmp_path / "second/scores.json")
    table = page.all("table", "scores")[0]
    heads = [head.text for head in table.one("thead").all("th")]
    assert heads == ["set", "mine", "first", "second"]
    row = table.one("tbody").all("tr")[0]
    assert row.one("th").text.startswith("A")
    assert [cell.text for cell in row.all("span", "score")] == ["20.0", "30.0", "40.0"]


def write_scores(path: Path, score: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = scores_file._values(results_of(score), "m")
    path.write_text(json.dumps({**values, "other": []}))


def test_equal_names_of_models_are_told_apart(gallery: Gallery, tmp_path: Path) -> None:
    write_scores(tmp_path / "mine/scores.json", 30.0)
    page = page_of(gallery, tmp_path / "r.html", tmp_path / "mine")
    heads = [head.text for head in page.all("thead")[0].all("th")]
    assert heads == ["set", "releases/mine", str(tmp_path / "mine")]


def test_what_cannot_be_compared_or_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]")
    write_scores(tmp_path / "nan.json", float("nan"))
    write_scores(tmp_path / "more.json", 100.5)
    cases = (
        ((None, [tmp_path]), "--compare puts other scores into the HTML report: name its file, --html OUT"),
        ((tmp_path / "a.html", [tmp_path / "none.json"]), "none.json: no such file of scores"),
        ((tmp_path / "a.html", [tmp_path]), "scores.json: no such file of scores"),
        ((tmp_path / "a.html", [tmp_path / "bad.json"]), "bad.json: not a file of scores"),
        ((tmp_path / "a.html", [tmp_path / "nan.json"]), "nan.json: not a file of scores"),
        ((tmp_path / "a.html", [tmp_path / "more.json"]), "more.json: not a file of scores"),
        ((tmp_path / "bad.json", [tmp_path / "bad.json"]), "--html .*bad.json: the scores are there; choose"),
        ((tmp_path / "none/a.html", []), "--html .*none/a.html: cannot write the page"),
    )
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            check_report(*arguments, out=tmp_path / "scores.json")
    with pytest.raises(ConfigError, match=r"--html .*scores.json: the scores are there; choose another file"):
        check_report(tmp_path / "x/../scores.json", [], out=tmp_path / "scores.json")
    check_report(tmp_path / "a.html", [], out=tmp_path / "scores.json")
    check_report(None, [], out=tmp_path / "scores.json")
