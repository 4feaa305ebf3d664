"""The scores of all methods as one table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.family.methods import Method
from tests.benchmarks.family.tasks import Comparison
from tests.benchmarks.table import commit, machine, markdown_table

UNSEEN = "Emoji_t2i-fxemoji"
"""Text -> image on a studio that no training saw: what the factor above chance is read from."""
COLUMNS = {
    UNSEEN: "text -> image",
    "Emoji_i2t-fxemoji": "image -> text",
    "Emoji_t2i-unseen-concepts": "unseen concepts",
    "EmojiGrounding-fxemoji": "grounding",
    "EmojiVQA-fxemoji": "questions",
}
"""MMEB sets and their headings; the unseen studio's but for the third."""
PAIRS = "minimal pairs"
SHEETS = "EmojiSheets-fxemoji"
"""Sheets of four drawings of the unseen studio, each to be found by the name of one of them."""
SHEETS_HEADING = "sheet by one name"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method."""

    title: str
    steps: str
    """Of each stage."""
    minutes: float
    """Of all its commands."""
    scores: Mapping[str, tuple[float, float]]
    """Heading -> (score, chance), in percent."""
    facts: Mapping[str, float | str] = field(default_factory=dict)
    """What only this method has, by what it says."""


@dataclass(frozen=True, kw_only=True)
class FamilyTable:
    """What `make family` found."""

    date: str
    commit: str
    machine: str
    num_pairs: int
    minutes: float
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, path: Path) -> FamilyTable:
        """What `write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(
            Entry(**{**entry, "scores": {name: tuple(pair) for name, pair in entry["scores"].items()}})
            for entry in values["entries"]
        )
        return cls(**{**values, "entries": entries})

    def write(self, folder: Path) -> None:
        """`folder`/measured.json and `folder`/measured.md."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (folder / "measured.json").write_text(text + "\n", encoding="utf-8")
        (folder / "measured.md").write_text(self.markdown(), encoding="utf-8")

    def summary(self) -> str:
        """One line: the factors above chance on the unseen studio."""
        heading = COLUMNS[UNSEEN]
        factors = (f"{entry.title} {_factor(entry.scores[heading])}" for entry in self.entries)
        return f"{heading} on the unseen studio, above chance: {'; '.join(factors)} ({self._origin}).\n"

    @property
    def _origin(self) -> str:
        return (
            f"{self.num_pairs:,} pairs a method, one seed, {self.minutes:.0f} min in all, {self.date}, "
            f"commit {self.commit}, {self.machine}"
        )

    def markdown(self) -> str:
        """The table, what only one method has, and where it was made."""
        headings = [*COLUMNS.values(), SHEETS_HEADING, PAIRS]
        rows = [
            [entry.title, entry.steps, *(_cell(heading, entry.scores[heading]) for heading in headings)]
            for entry in self.entries
        ]
        facts = [
            f"{entry.title}: " + "; ".join(f"{what} {_number(value)}" for what, value in entry.facts.items())
            for entry in self.entries
            if entry.facts
        ]
        table = markdown_table(("`make family`", "steps", *headings), rows)
        return (
            "\n".join(
                [*table, "", *(f"{line}." for line in facts), *([""] if facts else []), f"{self._origin}."]
            )
            + "\n"
        )


def _cell(heading: str, pair: tuple[float, float]) -> str:
    """With the factor above chance, which says more than the score where there are many candidates; minimal
    pairs have a chance that a model blind to the difference does not reach."""
    return f"{pair[0]:.1f} %" if heading == PAIRS else f"{pair[0]:.1f} % ({_factor(pair)})"


def _factor(pair: tuple[float, float]) -> str:
    score, chance = pair
    return f"{score / chance:.0f} x"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def table_of(comparison: Comparison, seconds: Mapping[str, float]) -> FamilyTable:
    """Read what the commands wrote. seconds: of each task."""
    entries = []
    for method in comparison.methods:
        own = [task.name for task in comparison.tasks_of(method)]
        values = json.loads(comparison.scores(method).read_text(encoding="utf-8"))
        entries.append(
            Entry(
                title=method.title,
                steps=" + ".join(str(comparison.steps(stage)) for stage in method.stages),
                minutes=round(sum(seconds[name] for name in own) / 60, 1),
                scores=scores_of(values),
                facts={**facts_of(values), **_agreement_of(comparison, method)},
            )
        )
    return FamilyTable(
        date=date.today().isoformat(),
        commit=commit(),
        machine=machine(),
        num_pairs=comparison.num_pairs,
        minutes=round(sum(seconds.values()) / 60, 1),
        entries=tuple(entries),
    )


def scores_of(values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Heading -> (score, chance), of a scores.json."""
    sets = {entry["name"]: (entry["score"], entry["chance"]) for entry in values["mmeb"]["sets"]}
    average = values["mmvp"]["average"]
    by_similarity = _sheets(values)
    return {
        **{heading: sets[name] for name, heading in COLUMNS.items()},
        SHEETS_HEADING: by_similarity.get("fused", by_similarity["global"]),
        PAIRS: (average["score"], average["chance"]),
    }


def _sheets(values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Similarity -> (score, chance) of sheets found by one of their names; one vector has `global` alone."""
    [sheets] = (entry["scores"] for entry in values["captions"] if entry["name"] == SHEETS)
    return {
        score["similarity"]: (score["recall_at_1"], score["chance_at_1"])
        for score in sheets
        if score["direction"] == "text to image"
    }


def facts_of(values: Mapping[str, Any]) -> dict[str, float | str]:
    """Fused against global, captions and regions, of a scores.json that has them."""
    found: dict[str, float | str] = {}
    if len(by_similarity := _sheets(values)) > 1:
        found[f"{SHEETS_HEADING}, by the global vectors alone"] = f"{by_similarity['global'][0]:.1f} %"
    for entry in values.get("caption_quality", ()):
        for score in entry["scores"]:
            found["CIDEr-D of captions of unseen drawings"] = score["cider_d"]
            found["of the best of 50 constant captions"] = score["constant_cider_d"]
    for entry in values.get("regions", ()):
        for score in entry["scores"]:
            at_1, chance = score["recall_at_1"], score["chance_at_1"]
            found[f"regions of unseen sheets, {score['direction']}, R@1"] = (
                f"{at_1:.1f} % ({at_1 / chance:.0f} x chance)"
            )
    return found


def _agreement_of(comparison: Comparison, method: Method) -> dict[str, float | str]:
    teacher = comparison.vectors("held_out_texts", "teacher")
    return {
        f"rank correlation with MiniLM on held-out texts {when}": agreement(_texts(teacher), _texts(student))
        for when, student in comparison.read_texts(method).items()
    }


def _texts(folder: Path) -> torch.Tensor:
    """(2 N, E) float32: the vectors of both sides of every pair."""
    (path,) = folder.glob("*.npy")
    return torch.from_numpy(np.load(path).astype(np.float32)).flatten(0, 1)


def agreement(teacher_NE: torch.Tensor, student_ND: torch.Tensor) -> float:
    """Mean over texts of Spearman's correlation between the two models' similarities to all other texts."""
    from agff.objectives.distillation import rank_correlation

    teacher_NN, student_NN = (
        torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        for rows in (teacher_NE, student_ND)
    )
    others_NN = ~torch.eye(len(teacher_NE), dtype=torch.bool)
    return rank_correlation(teacher_NN, student_NN, others_NN).mean().item()
