from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from agff.batch import Batch, Item
from agff.errors import DataError
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.convert import convert, prepare
from data_pipeline.decode import decode
from data_pipeline.layouts.image_regions import ImageRegions
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import RawSample, ShardReader
from data_pipeline.storage import LocalFolder
from launcher.command_line import parse_train_arguments
from launcher.pages.pictures import THUMBNAIL_PX
from launcher.preview import main
from launcher.previewing.samples import TextView
from launcher.run.config import BatchConfig, DataConfig, ResolvedRun, RunConfig, resolve
from launcher.run.data import build_processor, open_data
from launcher.run.hardware import Hardware
from tests import mmeb
from tests.drawings import tiny_backbone, write_drawings
from tests.launcher.html_pages import Element, read_page
from tests.launcher.runs import SMALL_RECIPE


@dataclass(frozen=True)
class Run:
    """Shards and the recipe that reads them."""

    folder: Path
    manifest: Manifest
    recipe: Path

    @property
    def reader(self) -> ShardReader:
        return ShardReader(LocalFolder(self.folder), self.manifest)

    def plan(self, *, batch: int = 16, sub_batch: int = 4, seed: int = 0) -> Plan:
        return Plan(self.manifest, Mixture(sub_batch_size=sub_batch), seed=seed, global_batch_size=batch)

    def planned(self, plan: Plan, step: int) -> list[tuple[str, int, RawSample]]:
        """(source, number, sample) of each row of the step."""
        rows = [(plan.source_names[source], int(number)) for source, number in plan.global_batch(step)]
        return [(source, number, self.reader.read(source, number)) for source, number in rows]

    def config(self, *options: str) -> RunConfig:
        return parse_train_arguments(["--recipe", str(self.recipe), *options]).config

    def batches(self, *options: str, num_steps: int) -> list[Batch]:
        """The first steps of a run of one rank that train starts with these options."""
        config = self.config(*options)
        data, processor = open_data(config), build_processor(config)
        batches = data.batches(resolved(config), processor, rank=0, start_step=0)
        return [next(batches) for _ in range(num_steps)]


def resolved(config: RunConfig) -> ResolvedRun:
    return resolve(
        config,
        {"zero_optimization": {"stage": 1}},
        deepspeed_name="zero1",
        world_size=1,
        hardware=Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=False),
    )


def open_run(folder: Path, backbone: Path) -> Run:
    recipe = folder.with_suffix(".yaml")
    values = {
        **SMALL_RECIPE,
        "name": "drawings",
        "num_steps": 50,
        "backbone": {"path": str(backbone)},
        "batch": {"global_batch_size": 16, "chunk_size": 4},
        "data": {"shards": str(folder), "sub_batch_size": 4, "num_workers": 0},
    }
    recipe.write_text(yaml.safe_dump(values))
    return Run(folder, read_manifest(LocalFolder(folder)), recipe)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Run:
    folder = tmp_path_factory.mktemp("drawn")
    prepare(write_drawings(folder / "drawings").mmeb, folder / "shards", rows_per_shard=10)
    return open_run(folder / "shards", backbone)


def preview(run: Run, out: Path, *options: str) -> Element:
    assert main(["--recipe", str(run.recipe), "--out", str(out), *options]) == 0
    return read_page(out)


def addresses(element: Element) -> list[str]:
    return [code.text for code in element.all("code", "address")]


def token_counts(element: Element) -> list[int]:
    return [int(span.text.split()[0].replace(",", "")) for span in element.all("span", "tokens")]


def write_run(folder: Path, backbone: Path, rows: list[dict[str, str]]) -> Run:
    """Shards of one source, `Sub`, and their recipe."""
    root = folder / "mmeb"
    (root / "Sub").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "Sub/original-00000-of-00001.parquet")
    prepare(root, folder / "shards")
    return open_run(folder / "shards", backbone)


FOUR = ["--batch.global_batch_size", "4"]
CHANGES: dict[str, Callable[[Path], Sequence[str]]] = {
    "seed": lambda _: ["--seed", "11"],
    "backbone.path": lambda folder: ["--backbone.path", str(backbone_of_other_limits(folder))],
    "prompts.num_fine": lambda _: ["--prompts.num_fine", "2"],
    "prompts.tokens_per_prompt": lambda _: ["--prompts.tokens_per_prompt", "3"],
    "processor.max_tokens": lambda _: ["--processor.max_tokens", "24"],
    "processor.min_pixels": lambda _: ["--processor.min_pixels", "12544"],
    "processor.max_pixels": lambda _: ["--processor.max_pixels", "784", "--processor.min_pixels", "784"],
    "batch.global_batch_size": lambda _: ["--batch.global_batch_size", "8"],
    "data.weights": lambda _: ["--data.weights", '{"Shapes_VQA": 3, "Shapes_text": 1}'],
    "data.caps": lambda _: ["--data.caps", "5"],
    "data.with_negatives": lambda _: ["--data.with_negatives", "false"],
    "data.sub_batch_size": lambda _: ["--data.sub_batch_size", "8"],
}
"""An override of each setting that decides what the batches of a run hold."""
CHANGES_NOTHING = {
    "batch.chunk_size",
    "batch.max_tokens_per_chunk",
    "batch.first_pass_chunks",
    "batch.keep_vision",
    "data.num_workers",
    "data.check_hashes",
    "data.stalled_after_s",
    "data.accept_changes",
    "data.cache",
}
IN_OTHER_TESTS = {"data.shards", "data.max_bad_in_a_row", "data.vectors"}


def backbone_of_other_limits(folder: Path) -> Path:
    other = tiny_backbone(folder / "other")
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_pixels": 12544, "max_pixels": 12544}))
    return other


def num_tokens_of_items(batch: Batch, num_prompt_tokens: int) -> int:
    """An item that occurs twice counts twice, as on the page."""
    lengths = torch.cat([chunk["prompt_start_B"] + num_prompt_tokens for chunk in batch.chunks])
    return int(lengths[batch.row_of_item_R].sum())


def test_every_setting_of_the_data_is_known_to_change_the_batches_or_not_to() -> None:
    groups = {"data": DataConfig, "processor": ProcessorConfig, "prompts": PromptConfig, "batch": BatchConfig}
    settings = {f"{name}.{field.name}" for name, group in groups.items() for field in fields(group)}
    assert settings | {"seed", "backbone.path"} == CHANGES.keys() | CHANGES_NOTHING | IN_OTHER_TESTS


@pytest.mark.parametrize("setting", [None, *CHANGES])
def test_page_shows_the_batches_that_train_makes_of_the_same_options(
    drawn: Run, tmp_path: Path, setting: str | None
) -> None:
    options = CHANGES[setting](tmp_path) if setting else []
    page = preview(drawn, tmp_path / "page.html", "--steps", "4", *options)
    batches = drawn.batches(*options, num_steps=4)
    assert addresses(page) == [address for batch in batches for address in batch.addresses]
    num_prompt_tokens = drawn.config(*options).prompts.num_tokens
    assert sum(token_counts(page)) == sum(num_tokens_of_items(batch, num_prompt_tokens) for batch in batches)
    num_negatives = len([item for cell in page.all("td", "negative") for item in cell.all("div", "item")])
    assert num_negatives == sum(batch.num_negatives for batch in batches)
    if setting:
        usual = preview(drawn, tmp_path / "usual.html", "--steps", "4")
        assert (addresses(page), token_counts(page)) != (addresses(usual), token_counts(usual))


def test_pairs_are_in_the_order_of_the_plan(
    drawn: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    options = [
        "--steps",
        "3",
        "--start_step",
        "5",
        "--seed",
        "7",
        "--batch.global_batch_size",
        "12",
        "--data.sub_batch_size",
        "3",
    ]
    page = preview(drawn, out, *options)
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


def test_each_negative_of_a_pair_has_its_column(backbone: Path, tmp_path: Path) -> None:
    texts = [f"{number}th" for number in range(12)]
    rows = [
        {**mmeb.row(qry=f"q{n}"), "neg_text": [], "neg_text_1": "", "neg_text_2": ""} | negatives
        for n, negatives in enumerate([{}, {"neg_text": texts[:11], "neg_text_2": texts[11]}] * 2)
    ]
    run = write_run(tmp_path, backbone, rows)
    page = preview(run, tmp_path / "page.html", "--batch.global_batch_size", "4", "--steps", "1")
    heads = [cell.text for cell in page.all("tr", "head")[0].all("th")]
    assert heads == ["pair", "query", "target", "negative", *(f"negative {n}" for n in range(1, 12))]
    shown = [
        [text.text for cell in pair.all("td", "negative") for text in cell.all("p", "text")]
        for pair in page.all("tr", "pair")
    ]
    assert sorted(shown) == [[], [], texts, texts]
    (batch,) = run.batches("--batch.global_batch_size", "4", num_steps=1)
    assert batch.num_negatives == 24


def test_the_region_that_a_step_draws_is_framed(backbone: Path, tmp_path: Path) -> None:
    boxes = [(n, n, n + 60, n + 40) for n in (4, 24, 44, 64)]
    for number in range(4):
        Image.new("RGB", (160, 120), "white").save(tmp_path / f"{number}.png")
    regions = [{"box": box, "phrase": f"at {box[0]}"} for box in boxes]
    (tmp_path / "r.json").write_text(
        json.dumps([{"image": f"{number}.png", "regions": regions} for number in range(4)])
    )
    layout = ImageRegions(root=tmp_path / "r.json", images=tmp_path, name="Parts")
    convert(layout, tmp_path / "shards", subsets=None, rows_per_shard=9, max_rows=None, executor=None)
    run = open_run(tmp_path / "shards", backbone)
    values = yaml.safe_load(run.recipe.read_text())
    # the others have no use for a region
    values |= {"objective": "mm_gem", "loss": {}, "prompts": {"num_fine": 0}}
    run.recipe.write_text(yaml.safe_dump(values))
    page = preview(run, tmp_path / "page.html", "--batch.global_batch_size", "4", "--steps", "3")
    shown = [
        (pair.one("td", "query").all("img")[0], pair.one("td", "target").one("p", "text").text)
        for pair in page.all("tr", "pair")
    ]
    config = run.config("--batch.global_batch_size", "4")
    batches = open_data(config).step_batches(resolved(config), build_processor(config), rank=0)
    examples = [example for step in range(3) for example in batches.examples(step)]
    assert [text for _, text in shown] == [example.target.text for example in examples]
    assert len({text for _, text in shown}) > 1
    for (image, text), example in zip(shown, examples, strict=True):
        content = base64.b64decode(str(image.attributes["src"]).partition(",")[2])
        thumbnail = Image.open(io.BytesIO(content)).convert("RGB")
        corner = int(text.removeprefix("at "))
        assert example.query.box == (corner, corner, corner + 60, corner + 40)
        for inside in ((corner + 1, corner + 20), (corner + 30, corner + 1), (corner + 59, corner + 20)):
            red, green, _ = thumbnail.getpixel(inside)
            assert red - green > 90, "the frame"
        assert min(thumbnail.getpixel((corner + 30, corner + 20))) > 240


def test_contents_lead_to_every_sub_batch(drawn: Run, tmp_path: Path) -> None:
    page = preview(drawn, tmp_path / "page.html")
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


def test_head_shows_sources_shares_and_settings(drawn: Run, tmp_path: Path) -> None:
    options = ["--data.weights", '{"Shapes_VQA": 3, "Shapes_text": 1}', "--seed", "11"]
    options += ["--data.caps", "20", "--data.with_negatives", "false"]
    page = preview(drawn, tmp_path / "page.html", *options)
    sources = [[cell.text for cell in row.all("td")] for row in page.one("table", "sources").all("tr")[1:]]
    assert [row[:5] for row in sources] == [
        ["Shapes_VQA", "96", "0", "20", "75.0%"],
        ["Shapes_text", "24", "0", "20", "25.0%"],
    ]
    headings = [heading.text.split()[0] for heading in page.all("h3")]
    assert [int(row[5]) for row in sources] == [headings.count("Shapes_VQA"), headings.count("Shapes_text")]
    settings = {row.one("th").text: row.one("td").text for row in page.one("table", "settings").all("tr")}
    assert settings["seed"] == "11"
    assert settings["steps shown"] == "0 to 1 of 50"
    assert settings["pairs used of a source"] == "at most 20"
    assert settings["weights"] == "Shapes_VQA 3, Shapes_text 1"
    assert settings["hard negatives"] == "left out (data.with_negatives)"
    assert page.one("h1").text == "Batches of drawings"
    assert str(drawn.folder) in page.text


def test_every_image_is_a_small_picture_inside_the_page(drawn: Run, tmp_path: Path) -> None:
    page = preview(drawn, tmp_path / "page.html", "--steps", "4")
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


def test_page_needs_nothing_from_elsewhere(drawn: Run, tmp_path: Path) -> None:
    page = preview(drawn, tmp_path / "page.html")
    assert [tag for tag in ("script", "link", "iframe", "object") if page.all(tag)] == []
    assert all((image.attributes["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert all((link.attributes["href"] or "").startswith("#") for link in page.all("a"))
    assert "url(" not in page.one("style").text
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_texts_are_escaped(tmp_path: Path, backbone: Path) -> None:
    text = "<script>alert('x')</script> & \"quoted\" &lt;\n</td></table> <b>end"
    rows = [
        {"qry": f"{text} {row}", "qry_image_path": "", "pos_text": text, "pos_image_path": ""}
        for row in range(4)
    ]
    run = write_run(tmp_path, backbone, rows)
    page = preview(run, tmp_path / "page.html", *FOUR, "--steps", "1")
    assert page.all("script") == []
    expected = [
        raw.record[role]["text"]
        for _, _, raw in run.planned(run.plan(batch=4), 0)
        for role in ("query", "target")
    ]
    assert [shown.text for shown in page.all("p", "text")] == expected
    assert text in expected


def test_text_that_no_utf_8_file_can_hold_is_shown_spelled_out(tmp_path: Path, backbone: Path) -> None:
    run = write_run(
        tmp_path,
        backbone,
        [{"qry": "half: HALF__", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""}] * 4,
    )
    (tar,) = run.folder.glob("Sub/*.tar")
    tar.write_bytes(tar.read_bytes().replace(b"HALF__", rb"\ud800"))
    page = preview(run, tmp_path / "page.html", *FOUR, "--steps", "1")
    assert {text.text for text in page.all("p", "text")} == {r"half: \ud800", "p"}
    assert "half a surrogate pair at character 6" in (tmp_path / "page.html").read_text()


def test_unusable_sample_is_shown_with_the_one_drawn_instead(
    drawn: Run, backbone: Path, tmp_path: Path
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
    damaged = open_run(copy, backbone)
    page = preview(damaged, tmp_path / "page.html", "--steps", "3")
    loaded = damaged.batches(num_steps=3)
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
    drawn: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    url = f"memory://preview-{tmp_path.name}"
    fsspec.filesystem("memory").put(str(drawn.folder), url, recursive=True)
    page = preview(drawn, tmp_path / "page.html", "--data.shards", url)
    planned = [raw.address for step in (0, 1) for _, _, raw in drawn.planned(drawn.plan(), step)]
    assert addresses(page) == planned
    assert (tmp_path / ".cache/agff/shards").is_dir()


def test_row_without_any_usable_sample_says_that_training_stops(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""}] * 4
    run = write_run(tmp_path, backbone, rows)
    (tar,) = run.folder.glob("Sub/*.tar")
    tar.write_bytes(b"\0" * tar.stat().st_size)
    options = [*FOUR, "--data.max_bad_in_a_row", "2"]
    page = preview(run, tmp_path / "page.html", *options, "--steps", "1")
    assert len(page.all("tr", "unusable")) == 4 * 3
    assert page.all("tr", "pair") == []
    assert page.text.count("3 unusable samples in a row: training would stop here") == 4
    assert "steps 0 to 0, 4 pairs, 12 unusable samples\n" in capsys.readouterr().out
    with pytest.raises(DataError, match="3 bad samples in a row for row 0 of step 0, allowed are 2"):
        run.batches(*options, num_steps=1)


def load_processor(backbone: Path, **limits: int) -> ItemProcessor:
    return ItemProcessor.from_folder(backbone, prompts=PromptConfig(), limits=ProcessorConfig(**limits))


def test_token_counts_are_those_of_the_processor(drawn: Run, backbone: Path, tmp_path: Path) -> None:
    options = ["--processor.max_tokens", "24", "--steps", "4"]
    page = preview(drawn, tmp_path / "page.html", *options)
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
    run = write_run(tmp_path, backbone, rows)
    options = [*FOUR, "--steps", "1", "--processor.max_tokens", "64"]
    page = preview(run, tmp_path / "page.html", *options, "--processor.max_pixels", "313600")
    reasons = [row.one("p", "reason").text for row in page.all("tr", "unusable")]
    assert reasons
    assert all(
        reason.startswith("Sub-00000.tar:000000003: query: image of (560, 560) pixels needs")
        for reason in reasons
    )
    fitting = preview(run, tmp_path / "page.html", *options, "--processor.max_pixels", "12544")
    assert fitting.all("tr", "unusable") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0 must be >= 1"),
        (["--start_step", "-1"], "--start_step -1 must be >= 0"),
        (["--start_step", "49"], "--start_step 49 --steps 2: the run has steps 0 to 49 (num_steps)"),
        (["--seed", "-1"], "seed=-1 must be >= 0"),
        (["--sed", "1"], "--sed: unknown; did you mean --seed?"),
        (["--recipe", "absent"], "--recipe absent: no such file"),
        (["--data.shards", "/nowhere"], "/nowhere: no shards here (manifest.json is missing)"),
        (["--batch.global_batch_size", "10"], "global_batch_size=10 is not a multiple of"),
        (["--data.weights", '{"Absent": 1}'], "data.weights names Absent, absent from the shards"),
        (["--out", "/nowhere/page.html"], "--out /nowhere/page.html: cannot write the page: no such folder"),
        (["--backbone.path", "/nowhere"], "/nowhere: no such folder; backbone.path"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    drawn: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "page.html"
    assert main(["--recipe", str(drawn.recipe), "--out", str(out), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not out.exists()
