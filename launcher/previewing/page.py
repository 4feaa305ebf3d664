"""The steps of a preview as one self-contained HTML page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from agff.batch import IMAGE_PLACEHOLDER
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan
from data_pipeline.reader import PAIR_ROLES, roles_of
from launcher.pages.pictures import Thumbnail
from launcher.previewing.samples import Row, SeenText, ShownItem, Step, SubBatch

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
.unusable td { background: #ffebe9; }
.reason, .lost { color: #b3151f; font-weight: 600; overflow-wrap: anywhere; }
.pairs .reason, .pairs .note { font-size: 13px; margin: 4px 0; }
.contents { background: #f6f8fa; padding: 8px 16px; }
.contents ol { margin: 4px 0; columns: 260px; }
.wide { overflow-x: auto; }
code, .settings td { overflow-wrap: anywhere; }
@media (max-width: 700px) { /* a phone: each pair is a card, its items below each other */
  body { padding: 12px; }
  .pairs, .pairs tbody, .pairs tr, .pairs td { display: block; width: auto; }
  .pairs .head { display: none; }
  .pairs tr { border: 1px solid #d0d7de; margin-bottom: 12px; }
  .pairs td { border: 0; }
  .pair td:first-child { background: #f6f8fa; }
  .pairs td:empty { display: none; }
  .query::before { content: "query"; } .target::before { content: "target"; }
  .negative::before { content: "negative"; }
  .query::before, .target::before, .negative::before { font-size: 12px; font-weight: 600; color: #59636e; }
}
"""

EXPLANATION = """\
A step trains on one <b>global batch</b> of pairs. It is made of <b>sub-batches</b>: groups of pairs that all
come from one source. Each query must find its own target among the targets of the whole global batch. Those
of its own sub-batch come from the same task and look alike, so they are harder to tell apart than those of
other sources. A negative is one more wrong answer, which the source itself names. Each table below a source's
name is one sub-batch.
"""


def page(
    run: str,
    location: str,
    manifest: Manifest,
    plan: Plan,
    settings: Mapping[str, object],
    steps: Sequence[Step],
) -> str:
    """The whole page: what was read and how, then the contents and the pairs of each step."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # whatever a text holds, the browser runs no script and loads nothing from elsewhere
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Batches of {html.escape(run)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>Batches of {html.escape(run)}</h1>",
            f"<p>Shards: <code>{html.escape(location)}</code></p>",
            f"<p class='explanation'>{EXPLANATION}</p>",
            _sources_table(manifest, plan, steps),
            _settings_table(settings),
            "<p>Go to "
            + ", ".join(f"<a href='#step-{step.number}'>step {step.number}</a>" for step in steps)
            + "</p>",
            *map(_step, steps),
            "</body>\n</html>\n",
        ]
    )


def _sources_table(manifest: Manifest, plan: Plan, steps: Sequence[Step]) -> str:
    shown = Counter(sub_batch.source for step in steps for sub_batch in step.sub_batches)
    used = plan.description["sources"]
    total = sum(values["share"] for values in used.values())
    columns = (
        "source",
        "pairs",
        "rejected rows",
        "pairs in an epoch",
        "share of sub-batches",
        "sub-batches shown here",
    )
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
    return "\n".join(
        ["<h2>Sources</h2>\n<div class='wide'><table class='sources'>", *lines, "</table></div>"]
    )


def _settings_table(settings: Mapping[str, object]) -> str:
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
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
    unusable = (
        f" <span class='reason'>{sub_batch.num_unusable} unusable</span>" if sub_batch.num_unusable else ""
    )
    return f"<small>{num_pairs} pair{'s' if num_pairs > 1 else ''}</small>{unusable}"


def _sub_batch(anchor: str, sub_batch: SubBatch) -> str:
    found = {role for row in sub_batch.rows for draw in row.draws for role in draw.items}
    roles = roles_of(dict.fromkeys((*PAIR_ROLES, *found)))
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("pair", *roles))
    lines = [line for row in sub_batch.rows for line in _row(row, sub_batch.source, roles)]
    return "\n".join(
        [
            f"<h3 id='{anchor}'>{html.escape(sub_batch.source)} {_counts(sub_batch)}</h3>",
            f"<table class='pairs'><tr class='head'>{head}</tr>",
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
                coming = (
                    f"{len(row.draws)} unusable samples in a row: training would stop here "
                    "(data.max_bad_in_a_row)."
                )
            notes.append(
                f"<p class='reason'>{html.escape(draw.reason)}</p><p class='note'>{html.escape(coming)}</p>"
            )
        address = f"<code class='address'>{html.escape(draw.address)}</code>" if draw.address else ""
        cells = "".join(
            f"<td class='{role.partition('_')[0]}'>{_item(draw.items.get(role))}</td>" for role in roles
        )
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
    lost = (
        f" <span class='lost'>The text lost its end: {seen.num_lost:,} tokens.</span>"
        if seen.num_lost
        else ""
    )
    return (
        f"<p class='seen' dir='auto'>{_escape(seen.before)}{image}{_escape(seen.after)}{prompts}</p>"
        f"<p class='count'><span class='tokens'>{seen.num_tokens:,} tokens</span>{lost}</p>"
    )


def _escape(text: str) -> str:
    """Escaped, with a visible sign before each line break and around the placeholder."""
    placeholder = html.escape(IMAGE_PLACEHOLDER)
    escaped = html.escape(text).replace(placeholder, f"<span class='mark'>{placeholder}</span>")
    return escaped.replace("\n", "<span class='newline'>\n</span>")
