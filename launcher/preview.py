"""`python launcher/preview.py SHARDS`: one HTML page that shows, pair by pair, what the loader yields."""

from __future__ import annotations

import argparse
import base64
import copy
import dataclasses
import html
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from agff.batch import IMAGE_PLACEHOLDER, Item
from agff.errors import AgffError, ConfigError, DataError
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.decode import decode
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ROLES, RawSample, ShardReader
from data_pipeline.storage import CacheConfig, open_folder
from launcher.command_line import report
from launcher.config import DataConfig

THUMBNAIL_PX = 192
"""Longer side of a picture on the page, at most."""
MAX_BAD_IN_A_ROW = DataConfig.max_bad_in_a_row
"""Unusable samples drawn in a row after which training stops, and so does the row here."""

ABOUT = """\
Write one HTML page that shows what the loader yields: for each step its sub-batches, for each pair its images and texts.

The order is that of a training run with the same shards, weights, caps, seed and batch sizes. With --backbone the page also
shows each text as the model gets it: cut to --max_tokens, image and prompts in their places. A sample that cannot be used
stands on the page in red, with its reason and with the sample that is drawn in its place.
Of remote shards, those that hold the shown samples are fetched whole into ~/.cache/agff/shards.
"""


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small copy of an image, as the page holds it."""

    data_uri: str
    original_size: tuple[int, int]
    """Width and height that the loader hands on."""


@dataclass(frozen=True, kw_only=True)
class SeenText:
    """An item's row of tokens, decoded back into text."""

    before: str
    """Text before the image; empty without one."""
    image: str
    """Stands for the image's tokens; empty without an image."""
    after: str
    prompts: str
    num_tokens: int
    num_lost: int
    """Tokens of the text that did not fit."""


@dataclass(frozen=True, kw_only=True)
class ShownItem:
    """What the page shows of a query, target or negative."""

    text: str
    thumbnail: Thumbnail | None = None
    seen: SeenText | None = None
    """None without a backbone."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One sample drawn for a row of the global batch."""

    sample: int
    """Its number in the source."""
    address: str
    """`shard.tar:key`; empty when the sample could not be read."""
    items: Mapping[str, ShownItem]
    """By role: query, target, negative."""
    reason: str = ""
    """Why the sample cannot be used; empty when it can."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the global batch: the sample that the plan names and, while one is unusable, those drawn instead."""

    number: int
    draws: tuple[Draw, ...]


@dataclass(frozen=True, kw_only=True)
class SubBatch:
    """Consecutive rows of a global batch from one source."""

    source: str
    rows: tuple[Row, ...]

    @property
    def num_unusable(self) -> int:
        """How many samples drawn for its rows cannot be used."""
        return sum(bool(draw.reason) for row in self.rows for draw in row.draws)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one training step consumes."""

    number: int
    sub_batches: tuple[SubBatch, ...]


class TextView:
    """Shows items as the model gets them, through the processor that training uses."""

    def __init__(self, processor: ItemProcessor) -> None:
        self.processor = processor
        self._unlimited = copy.copy(processor)
        self._unlimited.limits = dataclasses.replace(processor.limits, max_tokens=sys.maxsize)

    def __call__(self, item: Item) -> SeenText:
        """Raises DataError for an item that the backbone cannot take."""
        inputs = self.processor([item])
        ids = inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist()
        prompt_start = int(inputs["prompt_start_B"][0])
        image_start, image_stop, image = 0, 0, ""
        if item.image is not None:
            places = inputs["mm_token_type_ids"][0].nonzero().flatten().tolist()
            opening, closing = self.processor.family.around_image
            image_start, image_stop = places[0] - len(opening), places[-1] + 1 + len(closing)
            image = f"{''.join(opening)}<image: {len(places)} tokens>{''.join(closing)}"
        return SeenText(
            before=self._text(ids[:image_start]),
            image=image,
            after=self._text(ids[image_stop:prompt_start]),
            prompts=f"<prompt x{len(ids) - prompt_start}>",
            num_tokens=len(ids),
            num_lost=self._unlimited.num_tokens(item) - len(ids),
        )

    def _text(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """Draws the rows of global batches as the loader does, and shows what was drawn."""

    plan: Plan
    reader: ShardReader
    text_view: TextView | None

    def step(self, number: int, bar: tqdm) -> Step:
        """The step's global batch; `bar` advances by one for each pair."""
        rows, size = self.plan.global_batch(number), self.plan.description["sub_batch_size"]
        return Step(
            number=number,
            sub_batches=tuple(
                self._sub_batch(number, start, rows[start : start + size], bar) for start in range(0, len(rows), size)
            ),
        )

    def _sub_batch(self, step: int, start: int, rows: NDArray[np.int64], bar: tqdm) -> SubBatch:
        source = self.plan.source_names[int(rows[0, 0])]
        own = []
        for number, sample in enumerate(rows[:, 1], start=start):
            own.append(self._row(step, number, source, int(sample)))
            bar.update()
        return SubBatch(source=source, rows=tuple(own))

    def _row(self, step: int, number: int, source: str, sample: int) -> Row:
        draws = [self._draw(source, sample)]
        while draws[-1].reason and len(draws) <= MAX_BAD_IN_A_ROW:
            draws.append(self._draw(source, self.plan.redraw(step, number, attempt=len(draws))))
        return Row(number=number, draws=tuple(draws))

    def _draw(self, source: str, sample: int) -> Draw:
        raw = None
        try:
            raw = self.reader.read(source, sample)
            return Draw(sample=sample, address=raw.address, items=self._items(raw))
        except DataError as error:
            items = _texts(raw.record) if raw else {}
            return Draw(sample=sample, address=raw.address if raw else "", items=items, reason=str(error))

    def _items(self, raw: RawSample) -> dict[str, ShownItem]:
        seen_pixels = self.text_view.processor.max_image_pixels if self.text_view else None
        example = decode(raw, seen_pixels=seen_pixels)
        try:
            return {role: self._item(item) for role, item in zip(ROLES, example.items, strict=False)}
        except DataError as error:
            raise DataError(f"{raw.address}: {error}") from None

    def _item(self, item: Item) -> ShownItem:
        return ShownItem(
            text=item.text,
            thumbnail=make_thumbnail(item.image) if item.image else None,
            seen=self.text_view(item) if self.text_view else None,
        )


def _texts(record: object) -> dict[str, ShownItem]:
    """The texts of a record that may be malformed."""
    sides = record if isinstance(record, Mapping) else {}
    return {role: ShownItem(text=str(sides[role]["text"])) for role in ROLES if role in sides and "text" in sides[role]}


def make_thumbnail(image: Image.Image) -> Thumbnail:
    """A copy of at most THUMBNAIL_PX on its longer side, as JPEG or PNG, whichever is smaller."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    encoded = {}
    for name in ("jpeg", "png"):
        with io.BytesIO() as file:
            small.save(file, format=name, optimize=True)
            encoded[name] = file.getvalue()
    kind, content = min(encoded.items(), key=lambda entry: len(entry[1]))
    return Thumbnail(
        data_uri=f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}", original_size=image.size
    )


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff;
  max-width: 1500px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; } h2 { font-size: 20px; margin-top: 48px; border-bottom: 2px solid #d0d7de; }
h3 { font-size: 16px; margin: 28px 0 8px; }
h3 small, .note { color: #59636e; font-weight: normal; }
a { color: #0550ae; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; border: 1px solid #d0d7de; padding: 8px 10px; }
th { background: #f6f8fa; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.pairs { width: 100%; table-layout: fixed; }
.pairs th:first-child { width: 170px; }
.address { display: block; font-size: 12px; overflow-wrap: anywhere; }
.item { display: flex; gap: 12px; align-items: flex-start; flex-wrap: wrap; }
.item figure { margin: 0; } .item img { display: block; max-width: 100%; border: 1px solid #d0d7de; }
.item figcaption, .count { font-size: 12px; color: #59636e; }
.words { flex: 1 1 160px; min-width: 0; }
.text, .seen { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 4px; }
.seen { background: #f6f8fa; padding: 4px 6px; font: 13px/1.5 ui-monospace, monospace; }
.count { margin: 0; }
.mark { background: #ddf4ff; color: #0550ae; border-radius: 3px; font: 13px ui-monospace, monospace; }
.newline::before { content: "\\21b5"; color: #8c959f; }
.unusable td { background: #ffebe9; } .reason, .lost { color: #b3151f; font-weight: 600; overflow-wrap: anywhere; }
.contents { background: #f6f8fa; padding: 8px 16px; }
.contents ol { margin: 4px 0; columns: 260px; }
"""

EXPLANATION = """\
A step trains on one <b>global batch</b> of pairs. It is made of <b>sub-batches</b>: groups of pairs that all come from one
source. Each query must find its own target among the targets of the whole global batch. Those of its own sub-batch come from
the same task and look alike, so they are harder to tell apart than those of other sources. A negative is one more wrong
answer, which the source itself names. Each table below a source's name is one sub-batch.
"""


def page(location: str, manifest: Manifest, plan: Plan, settings: Mapping[str, object], steps: Sequence[Step]) -> str:
    """The whole page: what was read and how, then the contents and the pairs of each step."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # whatever a text holds, the browser runs no script and loads nothing from elsewhere
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            f"<title>Preview of {html.escape(location)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            "<h1>What the loader yields</h1>",
            f"<p>Shards: <code>{html.escape(location)}</code></p>",
            f"<p class='explanation'>{EXPLANATION}</p>",
            _sources_table(manifest, plan, steps),
            _settings_table(settings),
            "<p>Go to " + ", ".join(f"<a href='#step-{step.number}'>step {step.number}</a>" for step in steps) + "</p>",
            *map(_step, steps),
            "</body>\n</html>\n",
        ]
    )


def _sources_table(manifest: Manifest, plan: Plan, steps: Sequence[Step]) -> str:
    shown = Counter(sub_batch.source for step in steps for sub_batch in step.sub_batches)
    used = plan.description["sources"]
    total = sum(values["share"] for values in used.values())
    columns = ("source", "pairs", "rejected rows", "pairs in an epoch", "share of sub-batches", "sub-batches shown here")
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>"]
    for name in plan.source_names:
        source = manifest.sources[name]
        numbers = (
            f"{source.num_samples:,}",
            f"{source.num_rejected:,}",
            f"{used[name]['samples']:,}",
            f"{used[name]['share'] / total:.1%}",
            f"{shown[name]:,}",
        )
        cells = "".join(f"<td class='number'>{number}</td>" for number in numbers)
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return "\n".join(["<h2>Sources</h2>\n<table class='sources'>", *lines, "</table>"])


def _settings_table(settings: Mapping[str, object]) -> str:
    rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in settings.items())
    return f"<h2>Settings</h2>\n<table class='settings'>{''.join(rows)}</table>"


def _step(step: Step) -> str:
    anchors = [f"step-{step.number}-{index}" for index in range(1, len(step.sub_batches) + 1)]
    entries = "".join(
        f"<li><a href='#{anchor}'>{html.escape(sub_batch.source)}</a> {_counts(sub_batch)}</li>"
        for anchor, sub_batch in zip(anchors, step.sub_batches, strict=True)
    )
    return "\n".join(
        [
            f"<h2 id='step-{step.number}'>Step {step.number}</h2>",
            f"<nav class='contents'>Sub-batches of step {step.number}<ol>{entries}</ol></nav>",
            *map(_sub_batch, anchors, step.sub_batches),
        ]
    )


def _counts(sub_batch: SubBatch) -> str:
    num_pairs = len(sub_batch.rows)
    unusable = f" <span class='reason'>{sub_batch.num_unusable} unusable</span>" if sub_batch.num_unusable else ""
    return f"<small>{num_pairs} pair{'s' if num_pairs > 1 else ''}</small>{unusable}"


def _sub_batch(anchor: str, sub_batch: SubBatch) -> str:
    found = {role for row in sub_batch.rows for draw in row.draws for role in draw.items}
    roles = [role for role in ROLES if role in found or role != "negative"]
    head = "".join(f"<th>{name}</th>" for name in ("pair", *roles))
    lines = [line for row in sub_batch.rows for line in _row(row, sub_batch.source, roles)]
    return "\n".join(
        [
            f"<h3 id='{anchor}'>{html.escape(sub_batch.source)} {_counts(sub_batch)}</h3>",
            f"<table class='pairs'><tr>{head}</tr>",
            *lines,
            "</table>",
        ]
    )


def _row(row: Row, source: str, roles: Sequence[str]) -> Iterator[str]:
    for attempt, draw in enumerate(row.draws):
        notes = [f"<p class='count'>row {row.number}, sample {draw.sample:,}</p>"]
        if attempt:
            notes.append(f"<p class='note'>drawn in place of the unusable one above (draw {attempt})</p>")
        if draw.reason:
            coming = f"Another sample of {source} will be drawn in its place."
            if draw is row.draws[-1]:
                coming = f"{len(row.draws)} unusable samples in a row: training would stop here (data.max_bad_in_a_row)."
            notes.append(f"<p class='reason'>{html.escape(draw.reason)}</p><p class='note'>{html.escape(coming)}</p>")
        address = f"<code class='address'>{html.escape(draw.address)}</code>" if draw.address else ""
        cells = "".join(f"<td class='{role}'>{_item(draw.items.get(role))}</td>" for role in roles)
        kind = "unusable" if draw.reason else "pair"
        yield f"<tr class='{kind}'><td>{address}{''.join(notes)}</td>{cells}</tr>"


def _item(item: ShownItem | None) -> str:
    if item is None:
        return ""
    seen = _seen(item.seen) if item.seen else ""
    return (
        f"<div class='item'>{_figure(item.thumbnail) if item.thumbnail else ''}"
        f"<div class='words'><p class='text' dir='auto'>{_escape(item.text)}</p>{seen}</div></div>"
    )


def _figure(thumbnail: Thumbnail) -> str:
    width, height = thumbnail.original_size
    return (
        f"<figure><img src='{thumbnail.data_uri}' alt='image of {width} x {height} pixels'>"
        f"<figcaption>{width} x {height} pixels</figcaption></figure>"
    )


def _seen(seen: SeenText) -> str:
    image = f"<span class='mark'>{html.escape(seen.image)}</span>" if seen.image else ""
    prompts = f"<span class='mark'>{html.escape(seen.prompts)}</span>"
    lost = f" <span class='lost'>The text lost its end: {seen.num_lost:,} tokens.</span>" if seen.num_lost else ""
    return (
        f"<p class='seen' dir='auto'>{_escape(seen.before)}{image}{_escape(seen.after)}{prompts}</p>"
        f"<p class='count'><span class='tokens'>{seen.num_tokens:,} tokens</span>{lost}</p>"
    )


def _escape(text: str) -> str:
    """Escaped, with a visible sign before each line break and around the placeholder."""
    placeholder = html.escape(IMAGE_PLACEHOLDER)
    escaped = html.escape(text).replace(placeholder, f"<span class='mark'>{placeholder}</span>")
    return escaped.replace("\n", "<span class='newline'>\n</span>")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="preview", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", help="folder written by launcher/prepare.py, or its URL")
    parser.add_argument("--steps", type=int, default=2, help="how many steps are shown (default: %(default)s)")
    parser.add_argument("--start_step", type=int, default=0, help="the first one (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs of a global batch (default: %(default)s)")
    parser.add_argument("--sub_batch_size", type=int, default=4, help="pairs of a sub-batch (default: %(default)s)")
    parser.add_argument("--weights", help='JSON object, source -> share of the sub-batches; for example {"A": 2, "B": 1}')
    parser.add_argument("--caps", type=int, help="samples used of each source at most (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--backbone", type=Path, help="Hugging Face folder; shows texts as the model sees them")
    parser.add_argument("--max_tokens", type=int, help=f"tokens of an item (default: {ProcessorConfig.max_tokens})")
    parser.add_argument("--max_pixels", type=int, help="larger images are reduced (default: the backbone's own limit)")
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the page (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        sys.stdout.write(write_preview(arguments) + "\n")
    except AgffError as error:
        return report(error)
    return 0


def write_preview(arguments: argparse.Namespace) -> str:
    """Write the page that the command line asks for; the line that says so. Raises DataError or ConfigError."""
    _check(arguments)
    folder = open_folder(arguments.shards, CacheConfig())
    manifest = read_manifest(folder)
    weights = _read_weights(arguments.weights)
    mixture = Mixture(weights=weights, caps=arguments.caps, sub_batch_size=arguments.sub_batch_size)
    plan = Plan(manifest, mixture, seed=arguments.seed, global_batch_size=arguments.batch_size)
    processor = _processor(arguments)
    view = SampleView(plan=plan, reader=ShardReader(folder, manifest), text_view=TextView(processor) if processor else None)
    with tqdm(total=arguments.steps * arguments.batch_size, desc="preview", unit="pair") as bar:
        steps = [view.step(number, bar) for number in range(arguments.start_step, arguments.start_step + arguments.steps)]
    content = page(folder.location, manifest, plan, _settings(arguments, processor), steps)
    try:
        # a text may hold half of a surrogate pair, which no UTF-8 file can
        arguments.out.write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: cannot write the page: {error.strerror}; choose another file") from None
    num_unusable = sum(sub_batch.num_unusable for step in steps for sub_batch in step.sub_batches)
    return (
        f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB): "
        f"steps {steps[0].number} to {steps[-1].number}, {view.plan.description['global_batch_size'] * len(steps)} pairs, "
        f"{num_unusable} unusable samples"
    )


def _check(arguments: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "sub_batch_size", "max_pixels"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be >= 1")
    for name in ("start_step", "seed"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be >= 0")
    for name in ("max_tokens", "max_pixels"):
        if getattr(arguments, name) is not None and arguments.backbone is None:
            raise ConfigError(f"--{name} needs --backbone DIR: without one nothing is cut or reduced")


def _read_weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        weights = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--weights {text}: not JSON: {error}; write for example " + '{"A": 2, "B": 1}') from None
    if not isinstance(weights, dict) or not all(
        isinstance(weight, int | float) and math.isfinite(weight) for weight in weights.values()
    ):
        raise ConfigError(f"--weights {text}: expected a JSON object of numbers, for example " + '{"A": 2, "B": 1}')
    return weights


def _processor(arguments: argparse.Namespace) -> ItemProcessor | None:
    if arguments.backbone is None:
        return None
    max_tokens = ProcessorConfig.max_tokens if arguments.max_tokens is None else arguments.max_tokens
    limits = ProcessorConfig(max_tokens=max_tokens, max_pixels=arguments.max_pixels)
    return ItemProcessor.from_folder(arguments.backbone, prompts=PromptConfig(), limits=limits)


def _settings(arguments: argparse.Namespace, processor: ItemProcessor | None) -> dict[str, object]:
    """Name and value of each setting, for people."""
    settings = {
        "first step": arguments.start_step,
        "steps": arguments.steps,
        "pairs in a global batch": arguments.batch_size,
        "pairs in a sub-batch": arguments.sub_batch_size,
        "weights": arguments.weights or "number of pairs of each source",
        "cap of each source": "none" if arguments.caps is None else f"{arguments.caps:,} pairs",
        "seed": arguments.seed,
    }
    if processor is None:
        return {**settings, "backbone": f"none: texts are raw, {IMAGE_PLACEHOLDER} stands where the image belongs"}
    return {
        **settings,
        "backbone": arguments.backbone,
        "tokens of an item": f"at most {processor.limits.max_tokens:,}, of which {processor.prompts.num_tokens} are prompts",
        "pixels of an image": f"at most {processor.max_image_pixels:,}; larger images are reduced",
    }


if __name__ == "__main__":
    raise SystemExit(main())
