from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from agff.batch import Item
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.collate import FixedRows
from data_pipeline.convert import prepare
from data_pipeline.decode import decode
from data_pipeline.loader import StepBatches
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import RawSample, ShardReader
from data_pipeline.storage import LocalFolder
from launcher.preview import main
from launcher.previewing.samples import THUMBNAIL_PX, TextView, make_thumbnail
from tests.drawings import tiny_backbone, write_drawings

VOID = {"meta", "img"}


@dataclass
class Element:
    """One element of a page, with the elements below it."""

    tag: str
    attributes: Mapping[str, str | None] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """Those below it with this tag and (if given) class, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and kind in (None, child.attributes.get("class")):
                    found.append(child)
                found += child.all(tag, kind)
        return found

    def one(self, tag: str, kind: str | None = None) -> Element:
        (found,) = self.all(tag, kind)
        return found


class PageParser(HTMLParser):
    """Builds the elements of a page; fails when they are not closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(path: Path) -> Element:
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    (page,) = parser.open
    return page


@dataclass(frozen=True)
class Shards:
    folder: Path
    manifest: Manifest

    @property
    def reader(self) -> ShardReader:
        return ShardReader(LocalFolder(self.folder), self.manifest)

    def plan(self, *, batch: int = 16, sub_batch: int = 4, seed: int = 0) -> Plan:
        return Plan(self.manifest, Mixture(sub_batch_size=sub_batch), seed=seed, global_batch_size=batch)

    def planned(self, plan: Plan, step: int) -> list[tuple[str, int, RawSample]]:
        """(source, number, sample) of each row of the step."""
        rows = [(plan.source_names[source], int(number)) for source, number in plan.global_batch(step)]
        return [(source, number, self.reader.read(source, number)) for source, number in rows]


def open_shards(folder: Path) -> Shards:
    return Shards(folder, read_manifest(LocalFolder(folder)))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("drawn")
    prepare(write_drawings(folder / "drawings").mmeb, folder / "shards", rows_per_shard=10)
    return open_shards(folder / "shards")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


def preview(shards: Path | str, out: Path, *options: str) -> Element:
    assert main([str(shards), "--out", str(out), *options]) == 0
    return read_page(out)


def addresses(element: Element) -> list[str]:
    return [code.text for code in element.all("code", "address")]


def write_shards(folder: Path, rows: list[dict[str, str]]) -> Shards:
    """Shards of one source, `Sub`."""
    root = folder / "mmeb"
    (root / "Sub").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "Sub/original-00000-of-00001.parquet")
    prepare(root, folder / "shards")
    return open_shards(folder / "shards")


def test_pairs_stand_in_the_order_of_the_plan(
    drawn: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    options = [
        "--steps",
        "3",
        "--start_step",
        "5",
        "--seed",
        "7",
        "--batch_size",
        "12",
        "--sub_batch_size",
        "3",
    ]
    page = preview(drawn.folder, out, *options)
    plan = drawn.plan(batch=12, sub_batch=3, seed=7)
    planned = [row for step in (5, 6, 7) for row in drawn.planned(plan, step)]
    assert addresses(page) == [raw.address for _, _, raw in planned]
    headings = [heading.text for heading in page.all("h3")]
    assert headings == [f"{source} 3 pairs" for source, _, _ in planned[::3]]
    assert len(set(headings)) > 2, "several sources are shown"
    shown = [[text.text for text in pair.all("p", "text")] for pair in page.all("tr", "pair")]
    assert shown == [
        [raw.record[role]["text"] for role in ("query", "target", "negative") if role in raw.record]
        for _, _, raw in planned
    ]
    line = f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): steps 5 to 7, 36 pairs, 0 unusable samples\n"
    assert capsys.readouterr().out == line


def test_contents_lead_to_every_sub_batch(drawn: Shards, tmp_path: Path) -> None:
    page = preview(drawn.folder, tmp_path / "page.html")
    contents = page.all("nav", "contents")
    assert len(contents) == 2
    links = [link for nav in contents for link in nav.all("a")]
    assert [link.attributes["href"] for link in links] == [
        f"#{heading.attributes['id']}" for heading in page.all("h3")
    ]
    assert len({link.attributes["href"] for link in links}) == 2 * 4
    names = [
        drawn.plan().source_names[source]
        for step in (0, 1)
        for source in drawn.plan().global_batch(step)[::4, 0]
    ]
    assert [link.text for link in links] == names
    places = {
        heading.attributes["id"]
        for tag in ("h2", "h3")
        for heading in page.all(tag)
        if "id" in heading.attributes
    }
    assert {link.attributes["href"] for link in page.all("a")} == {f"#{place}" for place in places}
    assert {"step-0", "step-1"} < places


def test_head_tells_sources_shares_and_settings(drawn: Shards, tmp_path: Path) -> None:
    options = ["--weights", '{"Shapes_VQA": 3, "Shapes_text": 1}', "--caps", "20", "--seed", "11"]
    page = preview(drawn.folder, tmp_path / "page.html", *options)
    sources = [[cell.text for cell in row.all("td")] for row in page.one("table", "sources").all("tr")[1:]]
    assert [row[:5] for row in sources] == [
        ["Shapes_VQA", "96", "0", "20", "75.0%"],
        ["Shapes_text", "24", "0", "20", "25.0%"],
    ]
    headings = [heading.text.split()[0] for heading in page.all("h3")]
    assert [int(row[5]) for row in sources] == [headings.count("Shapes_VQA"), headings.count("Shapes_text")]
    settings = {row.one("th").text: row.one("td").text for row in page.one("table", "settings").all("tr")}
    assert settings["seed"] == "11"
    assert settings["cap of each source"] == "20 pairs"
    assert str(drawn.folder) in page.text


def test_every_image_is_a_small_picture_inside_the_page(drawn: Shards, tmp_path: Path) -> None:
    page = preview(drawn.folder, tmp_path / "page.html", "--steps", "4")
    planned = [row for step in range(4) for row in drawn.planned(drawn.plan(), step)]
    pairs = page.all("tr", "pair")
    assert {source for source, _, _ in planned} == {"Shapes_VQA", "Shapes_i2t", "Shapes_t2i", "Shapes_text"}
    for pair, (source, _, raw) in zip(pairs, planned, strict=True):
        for role in ("query", "target", "negative"):
            pictures = [image for cell in pair.all("td", role) for image in cell.all("img")]
            assert len(pictures) == (role in raw.images), (source, role)
            for picture in pictures:
                kind, _, content = (picture.attributes["src"] or "").partition(";base64,")
                assert kind in ("data:image/png", "data:image/jpeg")
                with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
                    image.load()
                    assert max(image.size) <= THUMBNAIL_PX
                    assert image.size == (56, 56), "the drawings are small already"
        assert bool(pair.all("td", "negative")) == (source == "Shapes_t2i")


@pytest.mark.parametrize("size", [(800, 400), (100, 3000), (5000, 2)])
def test_thumbnail_is_small_and_the_image_keeps_its_size(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    thumbnail = make_thumbnail(image)
    with Image.open(io.BytesIO(base64.b64decode(thumbnail.data_uri.partition(",")[2]))) as small:
        assert max(small.size) == THUMBNAIL_PX
    assert thumbnail.original_size == image.size == size


def test_page_needs_nothing_from_elsewhere(drawn: Shards, tmp_path: Path) -> None:
    page = preview(drawn.folder, tmp_path / "page.html")
    assert [tag for tag in ("script", "link", "iframe", "object") if page.all(tag)] == []
    assert all((image.attributes["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert all((link.attributes["href"] or "").startswith("#") for link in page.all("a"))
    assert "url(" not in page.one("style").text
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "content" in meta.attributes]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_texts_are_escaped(tmp_path: Path) -> None:
    text = "<script>alert('x')</script> & \"quoted\" &lt;\n</td></table> <b>end"
    rows = [
        {"qry": f"{text} {row}", "qry_image_path": "", "pos_text": text, "pos_image_path": ""}
        for row in range(4)
    ]
    shards = write_shards(tmp_path, rows)
    page = preview(shards.folder, tmp_path / "page.html", "--batch_size", "4", "--steps", "1")
    assert page.all("script") == []
    expected = [
        raw.record[role]["text"]
        for _, _, raw in shards.planned(shards.plan(batch=4), 0)
        for role in ("query", "target")
    ]
    assert [shown.text for shown in page.all("p", "text")] == expected
    assert text in expected


def test_text_that_no_utf_8_file_can_hold_is_shown_spelled_out(tmp_path: Path) -> None:
    shards = write_shards(
        tmp_path, [{"qry": "half: HALF__", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""}] * 4
    )
    (tar,) = shards.folder.glob("Sub/*.tar")
    tar.write_bytes(tar.read_bytes().replace(b"HALF__", rb"\ud800"))
    page = preview(shards.folder, tmp_path / "page.html", "--batch_size", "4", "--steps", "1")
    assert {text.text for text in page.all("p", "text")} == {r"half: \ud800", "p"}
    assert "half a surrogate pair at character 6" in (tmp_path / "page.html").read_text()


def test_unusable_sample_is_shown_with_the_one_drawn_instead(
    drawn: Shards, backbone: Path, tmp_path: Path
) -> None:
    """The loader itself says which samples it skipped and what it took."""
    copy = tmp_path / "shards"
    for path in sorted(drawn.folder.rglob("*")):
        copied = copy / path.relative_to(drawn.folder)
        if path.is_file():
            copied.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            copied.write_bytes(
                content.replace(b"IDAT", b"XXXX", 6) if path.name.startswith("Shapes_t2i") else content
            )
    damaged = open_shards(copy)
    batches = StepBatches(
        plan=damaged.plan(),
        reader=damaged.reader,
        process=load_processor(backbone),
        rank=0,
        world_size=1,
        chunking=FixedRows(rows=16),
        max_bad_in_a_row=10,
    )
    page = preview(damaged.folder, tmp_path / "page.html", "--steps", "3", "--backbone", str(backbone))
    loaded = [batches[step] for step in range(3)]
    skipped = [sample.reason for batch in loaded for sample in batch.skipped]
    assert skipped
    bad = page.all("tr", "unusable")
    assert [row.one("p", "reason").text for row in bad] == skipped
    assert all(reason.endswith(".png: is a damaged PNG: its header cannot be read") for reason in skipped)
    assert [address for pair in page.all("tr", "pair") for address in addresses(pair)] == [
        address for batch in loaded for address in batch.addresses
    ]
    assert all("Another sample of Shapes_t2i will be drawn in its place." in row.text for row in bad)
    lines = [row for table in page.all("table", "pairs") for row in table.all("tr")]
    for row in bad:
        after = lines[lines.index(row) + 1]
        assert "drawn in place of the unusable one above" in after.text
        assert row.one("p", "count").text.split(",")[0] == after.all("p", "count")[0].text.split(",")[0]
        assert row.one("td", "query").one("p", "text").text.startswith("Find a photo of"), (
            "its text is there to look at"
        )


def test_remote_shards_are_shown_like_local_ones(
    drawn: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    url = f"memory://preview-{tmp_path.name}"
    fsspec.filesystem("memory").put(str(drawn.folder), url, recursive=True)
    page = preview(url, tmp_path / "page.html")
    planned = [raw.address for step in (0, 1) for _, _, raw in drawn.planned(drawn.plan(), step)]
    assert addresses(page) == planned
    assert (tmp_path / ".cache/agff/shards").is_dir()


def test_row_without_any_usable_sample_says_that_training_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""}] * 4
    shards = write_shards(tmp_path, rows)
    (tar,) = shards.folder.glob("Sub/*.tar")
    tar.write_bytes(b"\0" * tar.stat().st_size)
    page = preview(shards.folder, tmp_path / "page.html", "--batch_size", "4", "--steps", "1")
    assert len(page.all("tr", "unusable")) == 4 * 11
    assert page.all("tr", "pair") == []
    assert page.text.count("11 unusable samples in a row: training would stop here") == 4
    assert "steps 0 to 0, 4 pairs, 44 unusable samples\n" in capsys.readouterr().out


def load_processor(backbone: Path, **limits: int) -> ItemProcessor:
    return ItemProcessor.from_folder(backbone, prompts=PromptConfig(), limits=ProcessorConfig(**limits))


def test_token_counts_are_those_of_the_processor(drawn: Shards, backbone: Path, tmp_path: Path) -> None:
    options = ["--backbone", str(backbone), "--max_tokens", "24", "--steps", "4"]
    page = preview(drawn.folder, tmp_path / "page.html", *options)
    limited, unlimited = load_processor(backbone, max_tokens=24), load_processor(backbone, max_tokens=9999)
    items = [
        item
        for step in range(4)
        for _, _, raw in drawn.planned(drawn.plan(), step)
        for item in decode(raw).items
    ]
    shown = [words for pair in page.all("tr", "pair") for words in pair.all("div", "words")]
    cut = 0
    for words, item in zip(shown, items, strict=True):
        num_tokens, all_tokens = limited.num_tokens(item), unlimited.num_tokens(item)
        assert words.one("span", "tokens").text == f"{num_tokens} tokens"
        lost = [mark.text for mark in words.all("span", "lost")]
        assert lost == (
            [f"The text lost its end: {all_tokens - num_tokens} tokens."] if all_tokens > num_tokens else []
        )
        cut += bool(lost)
        seen = words.one("p", "seen").text
        assert seen.endswith("<prompt x5>")
        assert ("<|vision_start|><image: 4 tokens><|vision_end|>" in seen) == (item.image is not None)
    assert 0 < cut < len(items), "some texts are cut, others are not"


def test_seen_text_is_the_text_up_to_where_it_was_cut(backbone: Path) -> None:
    text = "one red circle, two green squares, three blue triangles " * 4
    image = Image.new("RGB", (56, 56))
    whole = TextView(load_processor(backbone))(Item(text=f"Before <|image_1|>{text}", image=image))
    assert (whole.before, whole.after, whole.num_lost) == ("Before ", text, 0)
    cut = TextView(load_processor(backbone, max_tokens=40))(Item(text=text))
    assert cut.num_tokens == 40
    assert cut.num_lost > 0
    assert text.startswith(cut.after)
    assert 0 < len(cut.after) < len(text)
    spelled = TextView(load_processor(backbone))(Item(text="a <|vision_start|> in the text"))
    assert (spelled.before + spelled.after, spelled.image) == ("a <|vision_start|> in the text", "")


def test_image_that_does_not_fit_the_backbone_is_shown_as_unusable(backbone: Path, tmp_path: Path) -> None:
    image = tmp_path / "mmeb/large.png"
    image.parent.mkdir()
    Image.new("RGB", (560, 560)).save(image)
    rows = [{"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""} for _ in range(3)]
    rows.append(
        {"qry": "<|image_1|> Name it.", "qry_image_path": "large.png", "pos_text": "p", "pos_image_path": ""}
    )
    shards = write_shards(tmp_path, rows)
    options = ["--batch_size", "4", "--steps", "1", "--backbone", str(backbone), "--max_tokens", "64"]
    page = preview(shards.folder, tmp_path / "page.html", *options, "--max_pixels", "313600")
    reasons = [row.one("p", "reason").text for row in page.all("tr", "unusable")]
    assert reasons
    assert all(
        reason.startswith("Sub-00000.tar:000000003: query: image of (560, 560) pixels needs")
        for reason in reasons
    )
    fitting = preview(shards.folder, tmp_path / "page.html", *options, "--max_pixels", "12544")
    assert fitting.all("tr", "unusable") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no shards here (manifest.json is missing)"),
        (["--steps", "0"], "--steps 0 must be >= 1"),
        (["--seed", "-1"], "--seed -1 must be >= 0"),
        (["--max_tokens", "64"], "--max_tokens needs --backbone DIR"),
    ],
)
def test_wrong_folder_and_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "page.html"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "10"], "global_batch_size=10 is not a multiple of data.sub_batch_size=4"),
        (["--weights", "{"], "--weights {: not JSON"),
        (["--weights", json.dumps({"Shapes_t2i": "much"})], "expected a JSON object of numbers"),
        (["--weights", json.dumps({"Absent": 1})], "data.weights names Absent, absent from the shards"),
        (
            ["--out", "/nowhere/page.html"],
            "--out /nowhere/page.html: cannot write the page: No such file or directory",
        ),
        (["--backbone", "/nowhere"], "/nowhere: not a backbone folder"),
    ],
)
def test_settings_that_the_shards_cannot_serve_are_refused(
    drawn: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([str(drawn.folder), "--out", str(tmp_path / "page.html"), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "page.html").exists()
