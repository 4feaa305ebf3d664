"""Which targets are one, and which are answers of a query."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from data_pipeline.corpora.pairs import SIDES, pair_items
from data_pipeline.layouts.training_rows import Pair, Side
from launcher.mining.candidates import candidates_of

TEXT = "<|image_1|>\nRepresent the given image.\n"


def test_texts_that_differ_in_case_and_blanks_and_files_of_equal_bytes_are_one(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("c", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.bmp")
    shutil.copy(tmp_path / "a.bmp", tmp_path / "b.bmp")
    a, b, c = (Side(text=TEXT, image=tmp_path / f"{name}.bmp") for name in "abc")
    other_text = Side(text="<|image_1|>\nName it.\n", image=tmp_path / "b.bmp")
    sides = [
        (Side(text="Is it red?"), Side(text="Yes")),
        (Side(text="is it  blue?\n"), Side(text=" yes\n")),
        (Side(text="IS IT RED?"), Side(text="no")),
        (Side(text="red"), a),
        (Side(text="find red"), b),
        (Side(text="blue"), c),
        (Side(text="what?"), other_text),
        (Side(text="a question"), Side(text="Is it red? ")),
    ]
    pairs = pair_items(
        "Sub",
        [Pair(query=query, target=target) for query, target in sides],
        sides=SIDES,
        folder=tmp_path,
        images=tmp_path,
        tables=[],
    )
    found = candidates_of(pairs, {place: place for place in range(pairs.num_items)})
    assert found.first_row.tolist() == [0, 2, 3, 5, 6, 7]
    assert found.positive.tolist() == [0, 0, 1, 2, 2, 3, 4, 5]
    # rows 0 and 2 ask the same, and row 7 has their question as its answer
    assert [set(answers) for answers in found.answers] == [{0, 1, 5}, {0}, {0, 1, 5}, {2}, {2}, {3}, {4}, {5}]
