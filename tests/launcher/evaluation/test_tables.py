"""What a reader of the tables sees."""

from __future__ import annotations

import dataclasses

import pytest

from agff.nested import Truncation
from agff.scoring import MmebReport, SetScore, mmeb_report, mmvp_report, set_score
from launcher.evaluation.tables import WIDTH, mmeb_table, mmvp_table, note_lines, truncations_tables


def score_of(name: str, *, meta_task: str = "vqa", hits: int = 5) -> SetScore:
    flags = [True] * hits + [False] * (10 - hits)
    return set_score(name, meta_task=meta_task, in_distribution=hits > 3, hits=flags, num_candidates=[4] * 10)


def two_sets() -> MmebReport:
    return mmeb_report([score_of("A"), score_of("B", meta_task="retrieval", hits=1)])


def rows_of(table: str) -> list[str]:
    return table.split("\n\n", 1)[1].splitlines()


def test_mmeb_table_is_aligned_complete_and_shows_chance_and_factor() -> None:
    sentence, rest = mmeb_table(two_sets()).split("\n\n")
    assert "Precision@1" in sentence
    assert "chance is what guessing gets" in sentence
    lines = rest.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith("-")] == [
        "set",
        "A",
        "B",
        "mean vqa",
        "mean retrieval",
        "mean in distribution",
        "mean out of distribution",
        "mean overall",
    ]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-6:] == ["score", "%", "chance", "%", "x", "chance"]
    assert lines[2].split() == ["A", "vqa", "yes", "10", "50.0", "25.00", "2.0"]
    assert lines[-1].split() == ["mean", "overall", "2", "sets", "20", "30.0", "25.00", "1.2"]


def test_mmvp_table_shows_error_chance_and_factor() -> None:
    sentence, rest = mmvp_table(mmvp_report(["Colour", "Colour", "Texts"], [True, False, False])).split(
        "\n\n"
    )
    assert "both texts pick their own image" in sentence
    lines = rest.splitlines()
    assert lines[2].split() == ["Colour", "2", "50.0", "35.4", "25.0", "2.0"]
    assert lines[-1].split() == ["average", "3", "25.0", "17.7", "25.0", "1.0"]


def test_truncations_have_a_row_each_with_the_mean_of_mmebs_sets() -> None:
    truncated = {
        Truncation(dim=1536, num_fine=4): {"A": 40.0, "B": 60.0, "MMVP": 30.0},
        Truncation(dim=256, num_fine=0): {"A": 30.0, "B": 51.0, "MMVP": 20.0},
    }
    [table] = truncations_tables(truncated, mmeb_sets=["B", "A"])
    header, _, *rows = rows_of(table)
    assert header.split("  ")[-1] == "MMVP"
    assert "mean of MMEB" in header
    assert [row.split() for row in rows] == [
        ["1536", "4", "7,680", "50.0", "30.0"],
        ["256", "0", "256", "40.5", "20.0"],
    ]


def test_many_scores_of_truncations_are_several_tables_of_a_hundred_columns() -> None:
    scores = {f"SugarCrepe, subset with a long name {number}": 10.0 * number for number in range(9)}
    tables = truncations_tables({Truncation(dim=131_072, num_fine=10): scores}, mmeb_sets=[])
    assert len(tables) == 3
    assert max(len(line) for table in tables for line in table.splitlines()) <= WIDTH
    found = [cell for table in tables for row in rows_of(table)[2:] for cell in row.split()[3:]]
    assert found == [f"{score:.1f}" for score in scores.values()]
    assert truncations_tables({}, mmeb_sets=["A"]) == []


def test_left_out_items_have_a_column_only_where_there_are_some() -> None:
    assert "left out" not in mmeb_table(two_sets()).lower()
    score = dataclasses.replace(score_of("A"), num_queries_left_out=1_200, num_candidates_left_out=34)
    table = mmeb_table(mmeb_report([score, score_of("B")]))
    assert "Left out: queries + candidates" in table
    assert rows_of(table)[2].endswith("  1,200 + 34")
    assert rows_of(table)[3].endswith("  0 + 0")
    table = mmvp_table(mmvp_report(["a"], [True], left_out=["a", "b"]))
    assert rows_of(table)[0].endswith("left out")
    assert [rows_of(table)[row].split()[-1] for row in (2, -1)] == ["1", "2"]


@pytest.mark.parametrize("length", [1, 25, 60, 200])
@pytest.mark.parametrize("task_length", [3, 14, 90])
def test_tables_fit_into_a_hundred_columns_with_their_numbers_whole(length: int, task_length: int) -> None:
    name = "n" * (length - 1) + "!"
    score = dataclasses.replace(
        score_of(name, meta_task="t" * task_length),
        num_queries=1_234_567,
        num_queries_left_out=12_345,
        num_candidates_left_out=1_234_567,
    )
    mmvp = mmvp_report([name], [True], left_out=[name])
    for table in (mmeb_table(mmeb_report([score])), mmvp_table(mmvp)):
        assert max(len(line) for line in table.splitlines()) <= WIDTH == 100
        row = rows_of(table)[2]
        assert row.split()[0].endswith("!")  # names that differ in their end can still be told apart
    note = note_lines(f"left out: {', '.join([name] * 9)}.")
    assert all(len(line) <= max(WIDTH, length + 2) for line in note.splitlines())
    assert note.count(name) == 9
    assert "1,234,567" in mmeb_table(mmeb_report([score]))
    assert rows_of(mmeb_table(mmeb_report([score])))[2].endswith("12,345 + 1,234,567")
