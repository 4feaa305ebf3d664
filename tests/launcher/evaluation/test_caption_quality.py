"""Captions that a model writes: the score, the constant beside it, and models that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agff.cider import CiderD
from agff.errors import DataError
from launcher.evaluate import main
from launcher.evaluation.caption_quality import CONSTANT_CANDIDATES, MAX_TOKENS, best_constant
from tests.captions import write_sugarcrepe, write_tables
from tests.launcher.colours import COLOURS, ColourModel

REFERENCES = {
    "red": ["a bright red square on the page", "all of it is red"],
    "green": ["a calm green field of one colour"],
    "blue": ["a deep blue sea without any ship", "nothing but blue"],
}


class Painter(ColourModel):
    """Says of each image what it was told to say of its colour."""

    def __init__(self, words: dict[str, str]) -> None:
        super().__init__()
        self.processor.cells = "an objective that pools images"
        self.words = words
        self.max_tokens: list[int] = []

    def caption(self, image: Image.Image, boxes: Any = None, *, max_tokens: int, **options: Any) -> list[str]:
        self.max_tokens.append(max_tokens)
        colour = image.getpixel((0, 0))
        name = next(name for name, value in COLOURS.items() if value == colour)
        if name not in self.words:
            raise DataError(f"{name}: refused")
        return [self.words[name]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    return write_tables(
        tmp_path / "own", {str(tmp_path / f"{n}.png"): texts for n, texts in REFERENCES.items()}
    )


def evaluate(folder: Path, *options: str, model: Any) -> int:
    run = str(folder.parent / "run")
    return main([run, "--caption_quality", str(folder), *options], load=lambda path: model)


def quality(folder: Path) -> Any:
    (entry,) = json.loads((folder.parent / "run/scores.json").read_text())["caption_quality"]
    return entry["scores"][0]


def test_score_is_cider_d_of_what_the_model_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"red": "a red square", "green": REFERENCES["green"][0], "blue": "a ship on the sea"}
    model = Painter(said)
    assert evaluate(folder, model=model) == 0
    judge = CiderD(list(REFERENCES.values()))
    expected = judge.scores(list(said.values()))
    assert expected[1] == pytest.approx(10)
    found = quality(folder)
    assert found["cider_d"] == pytest.approx(sum(expected) / 3, rel=1e-12)
    best = max((judge.constant_score(text), text) for texts in REFERENCES.values() for text in texts)
    assert (found["constant_cider_d"], found["constant_caption"]) == (pytest.approx(best[0]), best[1])
    assert (found["num_images"], found["num_references"], found["max_tokens"]) == (3, 5, MAX_TOKENS)
    assert model.max_tokens == [MAX_TOKENS] * 3
    assert model.encoded == []
    assert "Captions: CIDEr-D" in capsys.readouterr().out


def test_a_constant_caption_scores_what_is_printed_beside_it(folder: Path) -> None:
    assert evaluate(folder, model=Painter(dict.fromkeys(COLOURS, "x"))) == 0
    constant = quality(folder)["constant_caption"]
    assert evaluate(folder, model=Painter(dict.fromkeys(COLOURS, constant))) == 0
    found = quality(folder)
    assert found["cider_d"] == pytest.approx(found["constant_cider_d"], rel=1e-12)
    assert found["cider_d"] > 0


def test_constant_is_one_of_few_references_of_a_large_set() -> None:
    references = [(f"picture number {number}",) for number in range(400)]
    references[200] = ("picture number seven of a cat",)
    judge = CiderD(references)
    caption, score = best_constant(judge, references)
    tried = [references[index * 400 // CONSTANT_CANDIDATES][0] for index in range(CONSTANT_CANDIDATES)]
    assert caption in tried
    assert score == max(judge.constant_score(text) for text in tried)


def test_image_without_a_caption_is_named_or_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Painter({"red": "red", "blue": "blue"})
    assert evaluate(folder, model=model) == 2
    assert "green: refused" in capsys.readouterr().err
    assert evaluate(folder, "--allow_missing", model=model) == 0
    found = quality(folder)
    assert (found["num_images"], found["num_images_left_out"]) == (2, 1)
    assert "1 (images) of own" in capsys.readouterr().out.replace("\n", " ")


def test_model_that_only_embeds_is_refused_before_anything_is_encoded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ColourModel()
    assert evaluate(folder, "--captions", str(folder), model=model) == 2
    assert "this model only embeds, it writes no captions" in capsys.readouterr().err
    assert model.encoded == []


def test_set_without_references_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sugar = write_sugarcrepe(tmp_path / "sugar", [(str(tmp_path / "red.png"), "a", "b")])
    assert evaluate(sugar, model=Painter({})) == 2
    assert "SugarCrepe: holds choices between two captions, not references" in capsys.readouterr().err
