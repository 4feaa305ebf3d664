"""What scores.json keeps of a set beyond MMEB and MMVP: its kind, its scores, and when they were made.

{KIND: [{name, note, date, scores: [{...}]}]} for each of KINDS; a kind without a set is an empty list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from agff.recall import ChoiceScore, RecallScore
from launcher.evaluation.caption_quality import CaptionQuality

JudgedScore: TypeAlias = RecallScore | ChoiceScore | CaptionQuality

KINDS: Mapping[str, type[JudgedScore]] = {
    "captions": RecallScore,
    "choices": ChoiceScore,
    "regions": RecallScore,
    "caption_quality": CaptionQuality,
}
"""What a set is scored by; a set may be scored by several."""


@dataclass(frozen=True, kw_only=True)
class JudgedSet:
    """The scores of one set, with what must be said beside them."""

    kind: str
    """One of KINDS."""
    name: str
    scores: tuple[JudgedScore, ...]
    note: str | None
    date: str

    @property
    def left_out(self) -> str | None:
        """How much of the set could not be scored."""
        fields = ("num_queries_left_out", "num_pairs_left_out", "num_images_left_out")
        of_first = {
            getattr(score, "direction", getattr(score, "subset", "images")): getattr(score, field)
            for score in self.scores
            for field in fields
            if getattr(score, field, 0)
        }
        counts = ", ".join(f"{number:,} ({what})" for what, number in of_first.items())
        return f"{counts} of {self.name}" if counts else None


Judged: TypeAlias = Mapping[tuple[str, str], JudgedSet]
"""By (kind, name)."""


def judged_values(judged: Judged) -> dict[str, list[dict[str, Any]]]:
    """JSON values, a list of sets for each kind."""
    values: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for (kind, name), entry in judged.items():
        scores = [asdict(score) for score in entry.scores]
        values[kind].append({"name": name, "note": entry.note, "date": entry.date, "scores": scores})
    return values


def read_judged(values: Mapping[str, Any], score_of: Callable[..., Any]) -> Judged:
    """What `judged_values` wrote. score_of: (class, values) -> score, checked.

    Raises ValueError, TypeError or KeyError for what `judged_values` would not write.
    """
    judged: dict[tuple[str, str], JudgedSet] = {}
    for kind, score_class in KINDS.items():
        for entry in values.get(kind, []):  # a file from before this kind was scored
            scores = tuple(score_of(score_class, score) for score in entry["scores"])
            name, note, date = entry["name"], entry["note"], entry["date"]
            judged[kind, name] = JudgedSet(kind=kind, name=name, scores=scores, note=note, date=date)
    return judged
