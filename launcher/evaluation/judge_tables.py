"""Scores of caption sets, choices, regions and written captions as tables, with published scores beside
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from agff.recall import ChoiceScore, RecallScore, mean_choices
from data_pipeline.layouts.sugarcrepe import SUBSETS
from launcher.evaluation.caption_quality import CONSTANT_CANDIDATES, CaptionQuality
from launcher.evaluation.judged import Judged, JudgedSet
from launcher.evaluation.tables import aligned

ANCHORS = {
    "UniME 7B": {  # arXiv 2504.17432, on LLaVA-OneVision-7B
        "Flickr30k": (83.3, 94.4),
        "COCO": (54.8, 74.0),
        "ShareGPT4V": (93.9, 89.3),
        "Urban1k": (94.3, 95.5),
        "SugarCrepe": (80.5, 65.5, 82.2),
    },
    "OpenCLIP-L": {
        "Flickr30k": (67.3, 87.2),
        "COCO": (37.0, 58.1),
        "ShareGPT4V": (81.8, 84.0),
        "Urban1k": (47.0, 47.0),
        "SugarCrepe": (79.5, 62.7, 74.9),
    },
}
"""Published: R@1 text to image and image to text; of SugarCrepe Replace, Swap, Add."""
GROUPS = ("replace", "swap", "add")

_RECALL_HEADER = ["set", "direction", "by", "queries", "among", "R@1", "R@5", "R@10", "chance R@1"]
_Score = TypeVar("_Score")


def judge_tables(judged: Judged) -> list[str]:
    """A table for each kind that has a set."""
    sets = list(judged.values())
    makers = (
        ("captions", _captions_table),
        ("choices", _choices_table),
        ("regions", _regions_table),
        ("caption_quality", _quality_table),
    )
    of_kind = ((make, [entry for entry in sets if entry.kind == kind]) for kind, make in makers)
    return [make(entries) for make, entries in of_kind if entries]


def _captions_table(sets: Sequence[JudgedSet]) -> str:
    sentence = (
        "Caption retrieval: R@k is the share of queries (%) with one of their own among the k best; ties\n"
        "are misses. fused: all vectors; global: the global ones alone; other names: published scores."
    )
    rows: list[list[str] | None] = []
    for entry in sets:
        scores = _of_type(entry, RecallScore)
        rows += [None]
        for place, direction in enumerate(dict.fromkeys(score.direction for score in scores)):
            rows += [_recall_row(entry.name, score) for score in scores if score.direction == direction]
            rows += [
                [entry.name, direction, name, "", "", f"{published[entry.name][place]:.1f}", "", "", ""]
                for name, published in ANCHORS.items()
                if is_published(entry, published)
            ]
    return f"{sentence}\n\n{aligned([_RECALL_HEADER, *rows], num_text_columns=3)}"


def _regions_table(sets: Sequence[JudgedSet]) -> str:
    sentence = "Region retrieval: R@k (%) among the regions, or phrases, of the whole set; ties are misses."
    rows = [_recall_row(entry.name, score) for entry in sets for score in _of_type(entry, RecallScore)]
    return f"{sentence}\n\n{aligned([_RECALL_HEADER, None, *rows], num_text_columns=3)}"


def _choices_table(sets: Sequence[JudgedSet]) -> str:
    sentence = (
        "SugarCrepe: the score is the share of images (%) that are strictly more similar to their caption\n"
        "than to its negative; the means are over the subsets of a group. Other names: published scores."
    )
    rows: list[list[str] | None] = []
    for entry in sets:
        scores = _of_type(entry, ChoiceScore)
        for similarity in dict.fromkeys(score.similarity for score in scores):
            of_view = [score for score in scores if score.similarity == similarity]
            rows += [None, *map(_choice_row, of_view)]
            rows += [_choice_row(mean) for mean in group_means(of_view)]
        for name, published in ANCHORS.items():
            if is_published(entry, published):
                values = zip(GROUPS, published[entry.name], strict=True)
                rows += [None, *([f"mean {group}", name, "", f"{value:.1f}", ""] for group, value in values)]
    header = ["subset", "by", "pairs", "score %", "chance %"]
    return f"{sentence}\n\n{aligned([header, *rows], num_text_columns=2)}"


def group_means(scores: Sequence[ChoiceScore]) -> list[ChoiceScore]:
    """The means of SugarCrepe's groups, of scores by one similarity; a group that lacks a subset has none."""
    of_subset = {score.subset: score for score in scores}
    members = {group: [name for name in SUBSETS if name.split("_")[0] == group] for group in GROUPS}
    return [
        mean_choices(f"mean {group}", [of_subset[name] for name in names])
        for group, names in members.items()
        if of_subset.keys() >= set(names)
    ]


def _quality_table(sets: Sequence[JudgedSet]) -> str:
    sentence = (
        "Captions: CIDEr-D, 0 to 10, of what the model writes, and of a constant caption, the best of\n"
        f"{CONSTANT_CANDIDATES} references, which is what a model gets that looks at no image."
    )
    rows = []
    for entry in sets:
        for score in _of_type(entry, CaptionQuality):
            numbers = f"{score.num_images:,}", f"{score.num_references:,}"
            rows.append(
                [
                    entry.name,
                    score.constant_caption,
                    *numbers,
                    f"{score.cider_d:.3f}",
                    f"{score.constant_cider_d:.3f}",
                ]
            )
    header = ["set", "constant caption", "images", "references", "CIDEr-D", "constant"]
    return f"{sentence}\n\n{aligned([header, None, *rows], num_text_columns=2)}"


def is_published(entry: JudgedSet, published: Mapping[str, object]) -> bool:
    """Whether these scores are of what the published ones are of: of the same set, and of the whole of it."""
    return entry.name in published and entry.note is None and entry.left_out is None


def _of_type(entry: JudgedSet, score_class: type[_Score]) -> list[_Score]:
    return [score for score in entry.scores if isinstance(score, score_class)]


def _recall_row(name: str, score: RecallScore) -> list[str]:
    recalls = (score.recall_at_1, score.recall_at_5, score.recall_at_10)
    return [
        name,
        score.direction,
        score.similarity,
        f"{score.num_queries:,}",
        f"{score.num_candidates:,}",
        *(f"{recall:.1f}" for recall in recalls),
        f"{score.chance_at_1:.2f}",
    ]


def _choice_row(score: ChoiceScore) -> list[str]:
    numbers = f"{score.num_pairs:,}", f"{score.score:.1f}", f"{score.chance:.1f}"
    return [score.subset, score.similarity, *numbers]
