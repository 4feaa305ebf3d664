"""Scores by hand, of every kind that there is."""

from __future__ import annotations

from dataclasses import replace

from agff.nested import Truncation
from agff.recall import ChoiceScore, RecallScore
from agff.scoring import SetScore, mmvp_report
from launcher.evaluation.caption_quality import CaptionQuality
from launcher.evaluation.judged import JudgedSet
from launcher.evaluation.pattern_use import PatternUse
from launcher.evaluation.scores_file import Results, ScoredSet


def results_of(score: float = 20.0, **changes: object) -> Results:
    """Of one model."""
    sets = {
        name: ScoredSet(
            score=SetScore(
                name=name,
                meta_task=task,
                in_distribution=name == "A",
                num_queries=100,
                score=score + number,
                chance=4.0,
            ),
            note="these <b>imitate</b> the format.",
            date="2026-01-01",
        )
        for number, (name, task) in enumerate([("A", "vqa"), ("B", "retrieval"), ("C", "retrieval")])
    }
    whole = Truncation(dim=8, num_fine=4)
    found = Results(
        weights_sha256="f00d" * 16,
        settings={"max_queries": None, "fusion": {"beta": 0.05}},
        sets=sets,
        mmvp=mmvp_report(["Colour"] * 4 + ["Count"] * 2, [True, False, False, True, False, False]),
        mmvp_date="2026-01-01",
        judged={
            (kind, name): JudgedSet(kind=kind, name=name, scores=scores, note=None, date="2026-01-01")
            for kind, name, scores in (
                ("captions", "Flickr30k", (_recall("fused", 60.0), _recall("global", 50.0))),
                ("choices", "SugarCrepe", (_choice("fused", 70.0), _choice("global", 65.0))),
                ("regions", "Scenes", (_recall("global", 12.0),)),
                ("caption_quality", "Written", (_quality(),)),
            )
        },
        truncated={
            whole: {"A": score, "Flickr30k, text to image": 60.0},
            replace(whole, num_fine=0): {"A": score - 4, "Flickr30k, text to image": 50.0},
            replace(whole, dim=4): {"A": score - 6, "Flickr30k, text to image": 40.0},
        },
        patterns={name: _use(10.0 * number) for number, name in enumerate("ABC", start=1)},
    )
    return replace(found, **changes)


def _recall(similarity: str, score: float) -> RecallScore:
    return RecallScore(
        direction="text to image",
        similarity=similarity,
        num_queries=400,
        num_candidates=100,
        recall_at_1=score,
        recall_at_5=score + 5,
        recall_at_10=score + 9,
        chance_at_1=1.0,
    )


def _choice(similarity: str, score: float) -> ChoiceScore:
    return ChoiceScore(subset="swap_att", similarity=similarity, num_pairs=50, score=score)


def _quality() -> CaptionQuality:
    return CaptionQuality(
        num_images=3,
        num_references=6,
        cider_d=0.31,
        constant_cider_d=0.05,
        constant_caption="a <thing>",
        max_tokens=64,
    )


def _use(share: float) -> PatternUse:
    return PatternUse(
        num_pairs=100, global_global=share, fine_global=20.0, global_fine=30.0, fine_fine=50.0 - share
    )
