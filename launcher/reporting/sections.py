"""The tables of the report, from the scores of one or several models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from agff.recall import ChoiceScore, RecallScore
from agff.scoring import MeanScore, MmebReport, PatternScore, SetScore
from launcher.evaluation.caption_quality import CONSTANT_CANDIDATES, CaptionQuality
from launcher.evaluation.judge_tables import ANCHORS, group_means, is_published
from launcher.evaluation.judged import JudgedSet
from launcher.evaluation.scores_file import Results
from launcher.reporting.cells import Cell, Row, Section, binomial_error, error_of_mean, times_chance

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_Score = TypeVar("_Score", RecallScore, ChoiceScore, CaptionQuality)
_BySimilarity = TypeVar("_BySimilarity", RecallScore, ChoiceScore)


def sections_of(results: Sequence[Results]) -> list[Section]:
    """Those that any of the models has scores for; the first model's order comes first."""
    makers = (_mmeb, _mmvp, _captions, _choices, _regions, _quality)
    return [section for make in makers if (section := make(results)).rows]


def side_by_side(
    values: Sequence[Mapping[_Key, _Value]],
) -> Iterator[tuple[_Key, list[_Value | None]]]:
    """(name, each model's value or None) for every name that any of them has."""
    for name in dict.fromkeys(name for of_model in values for name in of_model):
        yield name, [of_model.get(name) for of_model in values]


def judged_scores(result: Results, kind: str, score_class: type[_Score]) -> dict[JudgedSet, list[_Score]]:
    """The scores of each set of a kind."""
    return {
        entry: [score for score in entry.scores if isinstance(score, score_class)]
        for (of_kind, _), entry in result.judged.items()
        if of_kind == kind
    }


def _mmeb(results: Sequence[Results]) -> Section:
    reports = [result.mmeb for result in results]
    sets = [{score.name: score for score in report.sets} if report else {} for report in reports]
    rows = [_set_row(name, scores) for name, scores in side_by_side(sets)]
    means = [_means(report) if report else {} for report in reports]
    rows += [
        Row(
            name="mean of all sets" if name == "overall" else f"mean {task_name(name)}",
            facts=_count(next(score for score, _ in filter(None, pairs)).num_sets, "set"),
            cells=[_mean_cell(*pair) if pair else None for pair in pairs],
            is_mean=True,
        )
        for name, pairs in side_by_side(means)
    ]
    return Section(
        anchor="mmeb",
        title="Sets in MMEB's layout",
        sentence=(
            "Precision@1: the share of queries for which the right candidate scores above all others. A mean "
            "counts its sets alike."
        ),
        what="set",
        rows=rows,
    )


def _set_row(name: str, scores: Sequence[SetScore | None]) -> Row:
    first = next(filter(None, scores))
    place = "in" if first.in_distribution else "out of"
    facts = f"{task_name(first.meta_task)}, {place} distribution, {_count(first.num_queries, 'query')}"
    return Row(name=name, facts=facts, cells=[_set_cell(score, first) if score else None for score in scores])


def _set_cell(score: SetScore, first: SetScore) -> Cell:
    beside = [times_chance(score.score, score.chance)]
    if score.num_queries != first.num_queries:
        beside.append(f"of {_count(score.num_queries, 'query')}")
    if score.num_queries_left_out or score.num_candidates_left_out:
        beside.append(f"left out: {score.num_queries_left_out:,} + {score.num_candidates_left_out:,}")
    return Cell(
        score=score.score,
        error=binomial_error(score.score, score.num_queries),
        chance=score.chance,
        beside="; ".join(beside),
    )


def _means(report: MmebReport) -> dict[str, tuple[MeanScore, float]]:
    """{name: (mean, its standard error)} of meta-tasks, distributions, overall."""
    members: dict[str, Callable[[SetScore], bool]] = {
        "in distribution": lambda score: score.in_distribution,
        "out of distribution": lambda score: not score.in_distribution,
        "overall": lambda score: True,
    }
    found = {}
    for mean in (*report.meta_tasks, *report.distributions, report.overall):
        belongs = members.get(mean.name, lambda score, task=mean.name: score.meta_task == task)
        errors = [binomial_error(score.score, score.num_queries) for score in report.sets if belongs(score)]
        found[mean.name] = (mean, error_of_mean(errors))
    return found


def _mean_cell(mean: MeanScore, error: float) -> Cell:
    beside = times_chance(mean.score, mean.chance)
    return Cell(score=mean.score, error=error, chance=mean.chance, beside=beside)


def _mmvp(results: Sequence[Results]) -> Section:
    patterns = [
        {score.name: score for score in (*result.mmvp.patterns, result.mmvp.average)} if result.mmvp else {}
        for result in results
    ]

    def cell(score: PatternScore) -> Cell:
        beside = times_chance(score.score, score.chance)
        return Cell(score=score.score, error=score.standard_error, chance=score.chance, beside=beside)

    return Section(
        anchor="mmvp",
        title="Minimal pairs in MMVP-VLM's layout",
        sentence="The share of pairs in which both texts pick their own image of the two.",
        what="pattern",
        short="minimal pairs, ",
        rows=[
            Row(
                name=name,
                facts=_count(next(filter(None, scores)).num_pairs, "pair"),
                cells=[cell(score) if score else None for score in scores],
                is_mean=name == "average",
            )
            for name, scores in side_by_side(patterns)
        ],
    )


def _captions(results: Sequence[Results]) -> Section:
    return Section(
        anchor="captions",
        title="Caption retrieval",
        sentence=(
            "R@1: the share of queries with one of their own at the first place; a tie is a miss. By all "
            "vectors where the model has fine ones."
        ),
        what="set and direction",
        rows=_recall_rows(results, "captions"),
    )


def _regions(results: Sequence[Results]) -> Section:
    return Section(
        anchor="regions",
        title="Region retrieval",
        sentence="R@1 among the regions, or the phrases, of the whole set; a tie is a miss.",
        what="set and direction",
        rows=_recall_rows(results, "regions"),
    )


def _recall_rows(results: Sequence[Results], kind: str) -> list[Row]:
    models: list[dict[str, tuple[RecallScore, str]]] = []
    for result in results:
        models.append({})
        for entry, scores in judged_scores(result, kind, RecallScore).items():
            for place, score in enumerate(by_best_similarity(scores)):
                facts = [f"{_count(score.num_queries, 'query')} among {score.num_candidates:,}"]
                facts += _published(entry, place) if kind == "captions" else []
                models[-1][f"{entry.name}, {score.direction}"] = score, "; ".join(facts)

    def cell(score: RecallScore, _: str) -> Cell:
        beside = (
            f"{times_chance(score.recall_at_1, score.chance_at_1)}; "
            f"R@5 {score.recall_at_5:.1f}, R@10 {score.recall_at_10:.1f}"
        )
        error = binomial_error(score.recall_at_1, score.num_queries)
        return Cell(score=score.recall_at_1, error=error, chance=score.chance_at_1, beside=beside)

    return [
        Row(
            name=name,
            facts=next(filter(None, pairs))[1],
            cells=[cell(*pair) if pair else None for pair in pairs],
        )
        for name, pairs in side_by_side(models)
    ]


def _published(entry: JudgedSet, place: int) -> list[str]:
    return [
        f"published: {name} {values[entry.name][place]:.1f}"
        for name, values in ANCHORS.items()
        if is_published(entry, values)
    ]


def _choices(results: Sequence[Results]) -> Section:
    models: list[dict[str, ChoiceScore]] = []
    for result in results:
        models.append({})
        for scores in judged_scores(result, "choices", ChoiceScore).values():
            best = by_best_similarity(scores)
            models[-1] |= {score.subset: score for score in (*best, *group_means(best))}

    def cell(score: ChoiceScore) -> Cell:
        error = binomial_error(score.score, score.num_pairs)
        return Cell(
            score=score.score, error=error, chance=score.chance, beside=_count(score.num_pairs, "pair")
        )

    return Section(
        anchor="choices",
        title="Choices between two captions",
        sentence=(
            "SugarCrepe's layout: the share of images that are strictly more similar to their caption than "
            "to its negative."
        ),
        what="subset",
        short="choices, ",
        rows=[
            Row(
                name=name,
                facts="",
                cells=[cell(score) if score else None for score in scores],
                is_mean=name.startswith("mean "),
            )
            for name, scores in side_by_side(models)
        ],
    )


def _quality(results: Sequence[Results]) -> Section:
    models: list[dict[str, CaptionQuality]] = [
        {
            entry.name: score
            for entry, scores in judged_scores(result, "caption_quality", CaptionQuality).items()
            for score in scores
        }
        for result in results
    ]

    def cell(score: CaptionQuality) -> Cell:
        beside = f"{_count(score.num_images, 'image')}; constant: “{score.constant_caption}”"
        return Cell(score=score.cider_d, chance=score.constant_cider_d, beside=beside)

    return Section(
        anchor="quality",
        title="Captions that the model writes",
        sentence=(
            f"CIDEr-D, 0 to 10. The mark is a constant caption, the best of {CONSTANT_CANDIDATES} "
            "references: what a model gets that looks at no image."
        ),
        what="set",
        short="CIDEr-D, ",
        rows=[
            Row(name=name, facts="", cells=[cell(score) if score else None for score in scores])
            for name, scores in side_by_side(models)
        ],
        chance_name="a constant caption",
        number="%.3f",
        unit="",
        ends=(0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    )


def by_best_similarity(scores: Sequence[_BySimilarity]) -> list[_BySimilarity]:
    """Those by the fused similarity; by the global one of a model without fine vectors."""
    names = {score.similarity for score in scores}
    return [score for score in scores if score.similarity == ("fused" if "fused" in names else "global")]


def task_name(name: str) -> str:
    """Of a meta-task, as people write it."""
    return "VQA" if name == "vqa" else name


def _count(number: int, what: str) -> str:
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what[:-1]}ies" if what.endswith("y") else f"{number:,} {what}s"
