"""MMVP-VLM's layout, and every way it can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from agff.batch import MMEB_TEXTS
from agff.errors import DataError
from data_pipeline.layouts.eval_items import EvalItem
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
    mmvp = read_mmvp(tmp_path)
    folder = tmp_path / "MLLM_VLM Images"
    first, second = mmvp.pairs
    assert (first.pattern, second.pattern) == ("Colour", "Texts")
    assert [mmvp.items[index] for index in first.texts] == [
        EvalItem("a photo of a red, round ball"),
        EvalItem("a photo of a blue ball"),
    ]
    assert [mmvp.items[index] for index in first.images] == [
        EvalItem(MMEB_TEXTS.image_alone, folder / "Colour/1.jpg"),
        EvalItem(MMEB_TEXTS.image_alone, folder / "Colour/2.jpg"),
    ]
    assert mmvp.items[second.images[1]].image == folder / "Texts/4.png"
    assert mmvp.findings == {}


def test_missing_image_is_named_and_its_pair_can_be_left_out(tmp_path: Path) -> None:
    questions = GOOD + "3,Texts,the word up\n4,Texts,the word down\n"
    mmvp = read_mmvp(write(tmp_path, questions, "Colour/1.jpg", "Colour/2.jpg", "Texts/3.jpg"))
    (line,) = mmvp.lines(mmvp.findings)
    assert line == (
        f"{tmp_path}/Questions.csv:line 5: image 'Texts/4.jpg' not found under {tmp_path}/MLLM_VLM Images"
    )
    left = mmvp.without(mmvp.findings)
    assert ([pair.pattern for pair in left.pairs], [pair.pattern for pair in left.left_out]) == (
        ["Colour"],
        ["Texts"],
    )
    assert left.used == tuple(sorted((*mmvp.pairs[0].texts, *mmvp.pairs[0].images)))


def test_a_type_that_no_folder_can_have_is_named(tmp_path: Path) -> None:
    long = "T" * 400
    mmvp = read_mmvp(write(tmp_path, f"{HEADER}1,{long},x\n2,{long},y\n", "T/1.jpg"))
    lines = mmvp.lines(mmvp.findings)
    assert len(lines) == 2
    assert all("cannot be read under" in line and "File name too long" in line for line in lines)


def test_byte_order_mark_and_other_columns_are_passed_over(tmp_path: Path) -> None:
    questions = "\ufeffStatement,Note,Question ID,Type\nx,n,1,T\n\ny,n,2,T\n"
    mmvp = read_mmvp(write(tmp_path, questions, "T/1.jpg", "T/2.jpg"))
    assert [mmvp.items[index].text for index in mmvp.pairs[0].texts] == ["a photo of x", "a photo of y"]


def test_every_line_with_an_unquoted_comma_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_mmvp(write(tmp_path, HEADER + "1,T,a man, with a hat\n2,T,a man, with a coat\n"))
    lines = [line for line in str(raised.value).splitlines() if "Questions.csv:line" in line]
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["line 2", "line 3"]
    assert "4 values for 3 columns: '1,T,a man, with a hat'" in lines[0]
    assert "must be in double quotes" in lines[0]


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
        (HEADER + "1,Colour,x\n2,Colour\n", r"line 3: 2 values for 3 columns: '2,Colour'"),
        (HEADER + "1,Colour,x\n2,Colour,x\n", r"line 3: both statements of the pair are 'x'"),
        (GOOD + GOOD[len(HEADER) :], r"line 4: Question ID 1 is line 2 too"),
        *(
            (HEADER + f"{number},Colour,x\n2,Colour,y\n", rf"line 2: Question ID '{number}' is not a whole")
            for number in ("1.0", "-1", "0", "01", "1e0", "\uff11", "")
        ),
        (
            HEADER + '1,Colour,"x\n2,Colour,y\n',
            r"Questions.csv: not a readable CSV .*line 3\): unexpected end",
        ),
        (
            HEADER + '1,Colour,"x\n2,Colour,y"\n',
            r"line 2: a value runs over several lines; is a closing quote",
        ),
        (HEADER + '1,Colour,"x" y\n', r"Questions.csv: not a readable CSV .*line 2\): ',' expected"),
        ("Type," + HEADER + "T,1,T,x\nT,2,T,y\n", r"Questions.csv: column Type is there twice"),
        (
            HEADER.replace(",", ";") + "1;T;x\n",
            r"missing columns Question ID, Type, Statement; found Question",
        ),
    ],
)
def test_bad_input_is_refused_with_its_address(tmp_path: Path, questions: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_mmvp(write(tmp_path, questions, "Colour/1.jpg"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Questions.csv: no such file; .* \(--mmvp\)"):
        read_mmvp(tmp_path)
