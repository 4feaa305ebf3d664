"""The tables of the report: numbers, errors, models side by side."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from launcher.evaluation.scores_file import Results
from launcher.reporting.cells import Axis, Cell, Row, axis_for, binomial_error
from launcher.reporting.sections import sections_of
from launcher.reporting.vectors import fine_rows, shares_rows, shorter_tables
from tests.launcher.reporting.results import results_of

KINDS = ("mmeb", "mmvp", "captions", "choices", "regions", "quality")


def rows_of(anchor: str, *results: Results) -> dict[str, Row]:
    [section] = [section for section in sections_of(results) if section.anchor == anchor]
    return {row.name: row for row in section.rows}


def cell_of(anchor: str, name: str, *results: Results) -> Cell:
    cell = rows_of(anchor, *results)[name].cells[0]
    assert cell is not None
    return cell


def test_every_kind_of_score_has_a_table() -> None:
    assert tuple(section.anchor for section in sections_of([results_of()])) == KINDS
    assert sections_of([Results(weights_sha256="w", settings={}, sets={})]) == []


@pytest.mark.parametrize(
    ("anchor", "name", "score", "count", "chance"),
    [
        ("mmeb", "A", 20.0, 100, 4.0),
        ("mmvp", "Colour", 50.0, 4, 25.0),
        ("captions", "Flickr30k, text to image", 60.0, 400, 1.0),
        ("choices", "swap_att", 70.0, 50, 50.0),
        ("regions", "Scenes, text to image", 12.0, 400, 1.0),
    ],
)
def test_a_share_has_its_binomial_error_and_its_chance(
    anchor: str, name: str, score: float, count: int, chance: float
) -> None:
    cell = cell_of(anchor, name, results_of())
    expected = 100 * math.sqrt(score / 100 * (1 - score / 100) / count)
    assert (cell.score, cell.error, cell.chance) == (score, pytest.approx(expected), chance)


def test_a_mean_has_the_error_of_a_mean_of_independent_sets() -> None:
    errors = [binomial_error(score, 100) for score in (20, 21, 22)]
    cell = cell_of("mmeb", "mean of all sets", results_of())
    assert cell.score == pytest.approx(21)
    assert cell.error == pytest.approx(math.hypot(*errors) / 3)
    retrieval = cell_of("mmeb", "mean retrieval", results_of())
    assert retrieval.error == pytest.approx(math.hypot(*errors[1:]) / 2)
    outside = cell_of("mmeb", "mean out of distribution", results_of())
    assert outside.error == retrieval.error


def test_models_are_side_by_side_set_by_set() -> None:
    first, second = results_of(20.0), results_of(30.0)
    fewer = replace(second.sets["B"], score=replace(second.sets["B"].score, num_queries=50))
    named = replace(second.sets["C"], score=replace(second.sets["C"].score, name="D"))
    second = replace(second, sets={"B": fewer, "D": named}, mmvp=None)
    rows = rows_of("mmeb", first, second)
    scores = {name: [cell and cell.score for cell in row.cells] for name, row in rows.items()}
    assert scores["A"] == [20, None]
    assert scores["B"] == [21, 31]
    assert scores["D"] == [None, 32]
    other = rows["B"].cells[1]
    assert other is not None
    assert "of 50 queries" in other.beside
    assert [cell is None for cell in rows_of("mmvp", first, second)["average"].cells] == [False, True]


def test_published_scores_are_beside_the_whole_published_set_only() -> None:
    facts = rows_of("captions", results_of())["Flickr30k, text to image"].facts
    assert "published: UniME 7B 83.3" in facts
    result = results_of()
    entry = replace(result.judged["captions", "Flickr30k"], note="the first 10 only")
    part = replace(result, judged={("captions", "Flickr30k"): entry})
    assert "published" not in rows_of("captions", part)["Flickr30k, text to image"].facts


def test_a_constant_caption_is_the_mark_of_written_ones() -> None:
    cell = cell_of("quality", "Written", results_of())
    assert (cell.score, cell.chance, cell.error) == (0.31, 0.05, None)


def test_shares_of_a_task_are_the_mean_of_its_sets() -> None:
    rows = {row.name: row.cells for row in shares_rows([results_of(), results_of(patterns={})])}
    assert rows["A"] == [(10, 20, 30, 40), None]
    assert rows["mean retrieval"] == [(25, 20, 30, 25), None]
    assert rows["mean VQA"] == [(10, 20, 30, 40), None]


def test_what_fine_vectors_bring_is_the_whole_against_the_global_vector_of_full_length() -> None:
    rows = fine_rows([results_of(), results_of(truncated={})])
    pairs = {row.name: row.cells for row in rows}
    assert {name: [cell.score for cell in cells[0] or ()] for name, cells in pairs.items()} == {
        "A": [20, 16],
        "Flickr30k, text to image": [60, 50],
    }
    assert all(cells[1] is None for cells in pairs.values())


def test_shorter_embeddings_have_a_table_where_more_than_the_global_vector_was_scored() -> None:
    whole, alone, *_ = results_of().truncated
    two = {cut: results_of().truncated[cut] for cut in (whole, alone)}
    [table] = shorter_tables([results_of(), results_of(truncated=two)], ["first", "second"])
    assert table.label == "first"
    assert table.rows[-1] == ["4 x 5", "20", "14.0", "40.0"]


def test_an_axis_holds_errors_and_chance() -> None:
    ends = (10.0, 25.0, 50.0, 100.0)
    assert axis_for([Cell(score=9.0, error=2.0), None], ends, "").end == 25
    assert axis_for([Cell(score=1.0, chance=30.0)], ends, "").end == 50
    assert axis_for([], ends, "").end == 10
    axis = Axis(end=50.0)
    assert [axis.place(value) for value in (-1.0, 12.5, 60.0)] == ["0.00", "25.00", "100.00"]
