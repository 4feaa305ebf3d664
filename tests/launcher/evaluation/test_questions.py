"""What each kind of set asks of vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from data_pipeline.layouts.caption_set import CaptionSet, ReferenceSet
from data_pipeline.layouts.eval_items import EvalItem
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmeb_sets import SetInfo
from data_pipeline.layouts.mmvp import MmvpPair, MmvpSet
from data_pipeline.layouts.region_set import RegionSet
from data_pipeline.layouts.sugarcrepe import CaptionChoice, ChoiceSet
from launcher.evaluation import questions
from launcher.evaluation.questions import Question, asked_of, words
from tests.launcher.colours import table_of

VECTORS = torch.arange(8.0).reshape(4, 1, 2)
TEXTS_AND_IMAGES = table_of("Find red\n", "Find blue\n", "<|image_1|>\n@r.png", "<|image_1|>\n@b.png")
BOX = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    benchmark: Any
    said: Any
    expected: list[Question]


CASES = {
    "mmeb": Case(
        benchmark=EvalSet(
            **TEXTS_AND_IMAGES,
            info=SetInfo(meta_task="retrieval", in_distribution=True),
            queries=(0, 1),
            candidates=((2, 3), (3, 2)),
        ),
        said=VECTORS,
        expected=[Question(0, (2,), (2, 3)), Question(1, (3,), (3, 2))],
    ),
    "mmvp": Case(
        benchmark=MmvpSet(
            **TEXTS_AND_IMAGES, pairs=(MmvpPair(pattern="Colour", texts=(0, 1), images=(2, 3)),)
        ),
        said=VECTORS,
        expected=[Question(0, (2,), (2, 3)), Question(1, (3,), (2, 3))],
    ),
    "captions": Case(  # the first text is right for both images
        benchmark=CaptionSet(**TEXTS_AND_IMAGES, captions=((0, 2), (1, 3), (0, 3))),
        said=VECTORS,
        expected=[Question(0, (2, 3), (2, 3)), Question(1, (3,), (2, 3))],
    ),
    "choices": Case(
        benchmark=ChoiceSet(
            **TEXTS_AND_IMAGES, choices=(CaptionChoice(subset="swap_att", image=2, caption=0, negative=1),)
        ),
        said=VECTORS,
        expected=[Question(2, (0,), (0, 1))],
    ),
    "regions": Case(  # its rows are phrases, then regions
        benchmark=RegionSet(**TEXTS_AND_IMAGES, regions=((2, BOX), (3, BOX)), phrases=((1, 0), (0, 1))),
        said={row: VECTORS[row] for row in (0, 1)} | {(row, BOX): VECTORS[row] for row in (2, 3)},
        expected=[Question(0, (2,), range(2, 4)), Question(1, (3,), range(2, 4))],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_kind_of_set_asks_its_questions(case: Case) -> None:
    asked = asked_of(case.benchmark, case.said)
    assert asked is not None
    assert asked.questions == case.expected
    assert asked.num_questions == len(case.expected)
    assert len(asked.items) == len(asked.vectors_NMD) == 4


def test_a_row_of_a_region_is_its_image_with_the_box() -> None:
    asked = asked_of(CASES["regions"].benchmark, CASES["regions"].said)
    assert asked is not None
    assert [(item.text.strip(), item.box) for item in asked.items[:3]] == [
        ("Find blue", None),
        ("Find red", None),
        ("<|image_1|>", BOX),
    ]
    torch.testing.assert_close(asked.vectors_NMD, VECTORS[[1, 0, 2, 3]])


def test_a_set_of_references_asks_for_no_vectors() -> None:
    references = ReferenceSet(**TEXTS_AND_IMAGES, references=((2, ("red",)), (3, ("blue",))))
    assert asked_of(references, {2: "red", 3: "red"}) is None


def test_of_a_large_set_some_questions_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "MOST_QUESTIONS", 2)
    captions = CaptionSet(
        **table_of("a", "b", "c", "d", "<|image_1|>\n@x.png", "<|image_1|>\n@y.png"),
        captions=((0, 4), (1, 5), (2, 4), (3, 5)),
    )
    asked = asked_of(captions, torch.zeros(6, 1, 2))
    assert asked is not None
    assert [question.query for question in asked.questions] == [0, 2]
    assert asked.num_questions == 4


def test_an_image_is_called_what_the_questions_call_it() -> None:
    asked = asked_of(CASES["captions"].benchmark, VECTORS)
    assert asked is not None
    assert asked.captions == {2: "red", 3: "red, blue"}


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        (EvalItem("Find  a cat\n"), "Find a cat"),
        (EvalItem("<|image_1|>\nName it.\n", "a.png"), "Name it."),
        (EvalItem("<|image_1|>\nRepresent the given image.\n", "a.png"), ""),
        (EvalItem("Represent the given image."), "Represent the given image."),
    ],
)
def test_words_are_without_what_only_the_model_needs(item: EvalItem, shown: str) -> None:
    assert words(item) == shown
