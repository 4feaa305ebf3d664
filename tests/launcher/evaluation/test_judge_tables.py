"""What a reader of the tables of captions, choices and regions sees."""

from __future__ import annotations

from dataclasses import replace

from agff.recall import ChoiceScore, RecallScore
from data_pipeline.layouts.sugarcrepe import SUBSETS
from launcher.evaluation.caption_quality import CaptionQuality
from launcher.evaluation.judge_tables import ANCHORS, judge_tables
from launcher.evaluation.judged import JudgedScore, JudgedSet
from launcher.evaluation.tables import WIDTH

T2I = RecallScore(
    direction="text to image",
    similarity="fused",
    num_queries=25_000,
    num_candidates=5_000,
    recall_at_1=12.34,
    recall_at_5=23.45,
    recall_at_10=34.56,
    chance_at_1=0.02,
)
I2T = replace(T2I, direction="image to text", num_queries=5_000, num_candidates=25_000)


def tables_of(kind: str, name: str, *scores: JudgedScore, note: str | None = None) -> list[list[str]]:
    """The words of each line of the only table."""
    entry = JudgedSet(kind=kind, name=name, scores=scores, note=note, date="today")
    (table,) = judge_tables({(kind, name): entry})
    assert max(map(len, table.splitlines())) <= WIDTH
    return [line.split() for line in table.splitlines()]


def test_published_scores_are_beside_each_direction_of_a_published_set() -> None:
    scores = (T2I, replace(T2I, similarity="global", recall_at_1=1.0), I2T)
    for name in ("COCO", "Flickr30k", "ShareGPT4V", "Urban1k"):
        rows = tables_of("captions", name, *scores)
        fused = [name, "text", "to", "image", "fused", "25,000", "5,000", "12.3", "23.4", "34.6", "0.02"]
        assert fused in rows
        for anchor, published in ANCHORS.items():
            for direction, score in zip(("text to image", "image to text"), published[name], strict=True):
                assert [name, *direction.split(), *anchor.split(), f"{score:.1f}"] in rows


def test_no_published_score_is_beside_a_set_that_differs_or_is_your_own() -> None:
    for name, note in (("COCO", "COCO has 3 images."), ("mine", None)):
        rows = tables_of("captions", name, T2I, I2T, note=note)
        assert not any(anchor.split()[0] in row for row in rows for anchor in ANCHORS)


def test_no_published_score_is_beside_a_part_of_the_set() -> None:
    for kind, name, score in (
        ("captions", "COCO", replace(T2I, num_queries_left_out=1)),
        ("choices", "SugarCrepe", ChoiceScore(subset="x", similarity="global", num_pairs=9, score=5.0)),
    ):
        whole = replace(score, **{field: 0 for field in vars(score) if field.endswith("_left_out")})
        part = replace(score, **{field: 1 for field in vars(score) if field.endswith("_left_out")})
        shown = [
            any(anchor.split()[0] in row for row in tables_of(kind, name, each) for anchor in ANCHORS)
            for each in (whole, part)
        ]
        assert shown == [True, False]


def test_a_group_that_lacks_a_subset_has_no_mean() -> None:
    scores = [
        ChoiceScore(subset=subset, similarity="global", num_pairs=10, score=50.0)
        for subset in SUBSETS
        if subset != "add_att"
    ]
    rows = tables_of("choices", "SugarCrepe", *scores, note="nothing remains of add_att")
    assert [row[:2] for row in rows if row[:1] == ["mean"]] == [["mean", "replace"], ["mean", "swap"]]


def test_sugarcrepe_shows_subsets_means_of_groups_and_published_means() -> None:
    scores = [
        ChoiceScore(subset=subset, similarity=similarity, num_pairs=10 * place, score=10.0 * place + extra)
        for similarity, extra in (("fused", 5), ("global", 0))
        for place, subset in enumerate(SUBSETS, start=1)
    ]
    rows = tables_of("choices", "SugarCrepe", *scores)
    assert ["swap_obj", "fused", "40", "45.0", "50.0"] in rows
    assert ["mean", "replace", "fused", "60", "25.0", "50.0"] in rows
    assert ["mean", "swap", "global", "90", "45.0", "50.0"] in rows
    assert ["mean", "add", "global", "130", "65.0", "50.0"] in rows
    assert ["mean", "swap", "UniME", "7B", "65.5"] in rows
    assert ["mean", "add", "OpenCLIP-L", "74.9"] in rows


def test_caption_quality_shows_the_constant_caption() -> None:
    quality = CaptionQuality(
        num_images=1_000,
        num_references=5_000,
        cider_d=1.2345,
        constant_cider_d=0.1,
        constant_caption="a man " * 30,
        max_tokens=64,
    )
    rows = tables_of("caption_quality", "own", quality)
    assert rows[-1][:3] == ["own", "a", "man"]
    assert rows[-1][-4:] == ["1,000", "5,000", "1.234", "0.100"]


def test_each_kind_has_a_table_of_its_own() -> None:
    regions = JudgedSet(kind="regions", name="S", scores=(T2I,), note=None, date="today")
    captions = JudgedSet(kind="captions", name="S", scores=(T2I,), note=None, date="today")
    tables = judge_tables({("regions", "S"): regions, ("captions", "S"): captions})
    assert [table.split(":")[0] for table in tables] == ["Caption retrieval", "Region retrieval"]
    assert judge_tables({}) == []
