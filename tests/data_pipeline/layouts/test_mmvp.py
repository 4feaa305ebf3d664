"""MMVP-VLM's layout, and every way it can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from agff.errors import DataError
from agff.item_text import MMEB_TEXTS
from data_pipeline.layouts.mmeb_eval import EvalItem
from data_pipeline.layouts.mmvp import read_mmvp

HEADER = "Question ID,Type,Statement\n"
GOOD = HEADER + '1,Colour,"a red, round ball"\n2,Colour,a blue ball\n'


def write(root: Path, questions: str, *images: str) -> Path:
    (root / "Questions.csv").write_text(questions)
    for image in images:
        path = root / "MLLM_VLM Images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_rows_become_pairs_of_texts_and_images(tmp_path: Path) -> None:
    questions = GOOD + "3,Texts,the word up\n4,Texts,the word down\n"
    write(tmp_path, questions, "Colour/1.jpg", "Colour/2.jpg", "Texts/3.jpg", "Texts/4.png")
    first, second = read_mmvp(tmp_path)
    folder = tmp_path / "MLLM_VLM Images"
    assert (first.pattern, second.pattern) == ("Colour", "Texts")
    assert first.texts == (EvalItem("a photo of a red, round ball"), EvalItem("a photo of a blue ball"))
    assert first.images == (
        EvalItem(MMEB_TEXTS.image_alone, folder / "Colour/1.jpg"),
        EvalItem(MMEB_TEXTS.image_alone, folder / "Colour/2.jpg"),
    )
    assert second.images[1].image_path == folder / "Texts/4.png"


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("Question ID,Type\n1,a\n", r"Questions.csv: missing columns Statement; found Question ID, Type"),
        (HEADER, r"Questions.csv: no rows"),
        (GOOD + "3,Colour,x\n", r"Questions.csv: 3 rows; rows 2k-1 and 2k are a pair"),
        (HEADER + "1,Colour,x\n2,Shape,y\n", r"Questions.csv:line 3: Type 'Shape', but .* is 'Colour'"),
        (HEADER + "2,Colour,x\n3,Colour,y\n", r"line 3: Question IDs 2 and 3 are no pair"),
        (HEADER + "1,Colour,x\n4,Colour,y\n", r"line 3: Question IDs 1 and 4 are no pair"),
        (HEADER + "one,Colour,x\n2,Colour,y\n", r"line 2: Question ID 'one' is not a whole number"),
        (HEADER + "1,Colour,\n2,Colour,y\n", r"line 2: empty Statement"),
        (HEADER + "1,../up,x\n2,../up,y\n", r"line 2: Type '../up' is also a folder and leaves"),
        (HEADER + "1,Colour,x\n2,Colour,y\n", r"line 3: image .*Colour/2.jpg not found"),
    ],
)
def test_bad_input_is_refused_with_its_address(tmp_path: Path, questions: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_mmvp(write(tmp_path, questions, "Colour/1.jpg"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Questions.csv: no such file; .* \(--mmvp\)"):
        read_mmvp(tmp_path)
