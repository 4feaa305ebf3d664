"""Mistakes and neighbours against a slow loop."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.layouts.eval_items import EvalItem
from launcher.evaluation import scores
from launcher.evaluation.questions import Asked, Question
from launcher.reporting.answers import mistakes_of, nearest
from tests.launcher.colours import ColourModel

NUM_ITEMS = 30


def drawn(questions: list[Question], *, num_values: int = 5) -> Asked:
    """Small whole numbers, so that there are ties."""
    generator = torch.Generator().manual_seed(3)
    vectors_NMD = torch.randint(-num_values, num_values, (NUM_ITEMS, 1, 4), generator=generator).float()
    return Asked(
        vectors_NMD=vectors_NMD,
        items=[EvalItem(str(row)) for row in range(NUM_ITEMS)],
        questions=questions,
        num_questions=len(questions),
    )


def by_hand(asked: Asked) -> list[tuple[int, float, int]]:
    """(query, margin, place) of each mistake, the largest margin first."""
    found = []
    for question in asked.questions:
        own = {
            row: float(asked.vectors_NMD[question.query, 0] @ asked.vectors_NMD[row, 0])
            for row in question.candidates
        }
        right = max(own[row] for row in question.right)
        wrong = [own[row] for row in question.candidates if row not in question.right]
        if wrong and max(wrong) >= right:
            found.append((question.query, max(wrong) - right, 1 + sum(value >= right for value in wrong)))
    return sorted(found, key=lambda mistake: -mistake[1])


QUESTIONS = {
    "shared candidates": [Question(row, (row + 10,), range(10, 20)) for row in range(10)],
    "several right ones": [Question(row, (10 + row, 11 + row), range(10, 22)) for row in range(10)],
    "their own candidates": [Question(row, (row + 8,), (row + 8, row + 9, row + 16)) for row in range(8)],
    "lists of other lengths": [
        Question(row, (row + 8,), tuple(range(row + 8, row + 10 + row))) for row in range(8)
    ],
    "all are right": [Question(0, (1, 2), (1, 2))],
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("questions", QUESTIONS.values(), ids=QUESTIONS)
def test_mistakes_are_those_of_a_slow_loop(
    questions: list[Question], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:  # no query shares its candidates
        monkeypatch.setattr(scores, "MOST_WASTE", 0)
    asked = drawn(questions)
    mistakes = mistakes_of(ColourModel(), asked)
    assert [(found.query, found.margin, found.place) for found in mistakes] == by_hand(asked)
    for mistake in mistakes:
        [question] = [question for question in questions if question.query == mistake.query]
        assert mistake.right in question.right
        assert mistake.wrong in question.candidates
        assert mistake.wrong not in question.right


def test_a_tie_is_a_mistake_of_margin_zero() -> None:
    asked = drawn([Question(0, (1,), (1, 2))])
    asked.vectors_NMD[2] = asked.vectors_NMD[1]
    [mistake] = mistakes_of(ColourModel(), asked)
    assert (mistake.margin, mistake.place, mistake.num_candidates) == (0, 2, 2)


def test_nearest_are_in_order_and_among_the_others() -> None:
    asked = drawn([])
    others = [3, 9, 4, 17]
    similarity = {row: float(asked.vectors_NMD[5, 0] @ asked.vectors_NMD[row, 0]) for row in others}
    expected = sorted(similarity.items(), key=lambda entry: -entry[1])[:3]
    assert nearest(ColourModel(), asked, 5, others=others, count=3) == expected
    assert nearest(ColourModel(), asked, 5, others=[], count=3) == []
