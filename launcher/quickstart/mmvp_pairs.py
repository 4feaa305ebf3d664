"""The MMVP-VLM set: pairs of concepts that differ in one respect, drawn by a studio unseen in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from agff.images import decode_image
from launcher.quickstart.layouts import MinimalPair, write_mmvp
from launcher.quickstart.render import Drawing

STUDIOS_IN_ORDER = ("fxemoji", "noto-v1")
"""Both drawings of a pair come from the first of these that has both."""


def write_mmvp_set(mmvp: Path, drawings: Sequence[Drawing]) -> dict[str, int]:
    """Write Questions.csv and the images; {pattern: pairs}."""
    pairs = choose_pairs(load_concept_pairs(), drawings)
    write_mmvp(mmvp, pairs)
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.pattern] = counts.get(pair.pattern, 0) + 1
    return counts


def load_concept_pairs() -> dict[str, list[tuple[str, str]]]:
    """{MMVP-VLM pattern: pairs of concept names}, written by hand."""
    text = Path(__file__).with_name("minimal_pairs.json").read_text(encoding="utf-8")
    return {
        pattern: [(first, second) for first, second in pairs] for pattern, pairs in json.loads(text).items()
    }


def choose_pairs(
    concept_pairs: Mapping[str, Sequence[tuple[str, str]]], drawings: Sequence[Drawing]
) -> list[MinimalPair]:
    """The pairs that a held-out studio draws; twins are gone already, so both drawings differ."""
    by_studio: dict[str, dict[str, Drawing]] = {studio: {} for studio in STUDIOS_IN_ORDER}
    for drawing in drawings:
        if drawing.studio in by_studio:
            by_studio[drawing.studio][drawing.concept.name] = drawing
    return [
        _pair(pattern, studio[first], studio[second])
        for pattern, pairs in concept_pairs.items()
        for first, second in pairs
        if (studio := next((s for s in by_studio.values() if first in s and second in s), None)) is not None
    ]


def _pair(pattern: str, first: Drawing, second: Drawing) -> MinimalPair:
    return MinimalPair(
        pattern=pattern,
        statements=(first.concept.text, second.concept.text),
        images=(
            decode_image(first.png, first.concept.text, formats=("PNG",)),
            decode_image(second.png, second.concept.text, formats=("PNG",)),
        ),
    )
