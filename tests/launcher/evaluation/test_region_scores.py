"""Regions and phrases: retrieval both ways, what is encoded how often, and models that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from agff.batch import Item
from launcher.evaluate import main
from tests.launcher.colours import COLOURS, ColourModel

Box = tuple[float, float, float, float]


class RegionModel(ColourModel):
    """Embeds a region as the colour at its upper left corner."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.processor.cells = "an objective that pools images"
        self.regions: list[Box] = []

    def _vector(self, item: Item) -> Tensor:
        if item.image is None or item.box is None:
            return super()._vector(item)
        self.regions.append(item.box)
        x, y, _, _ = item.box
        return torch.tensor(item.image.getpixel((int(x), int(y)))) / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of which the left half is one colour and the right another."""
    (tmp_path / "run").mkdir()
    folder = tmp_path / "halves"
    (folder / "images").mkdir(parents=True)
    rows = []
    for name, left, right in (("a", "red", "green"), ("b", "blue", "red")):
        image = Image.new("RGB", (8, 4), COLOURS[left])
        image.paste(COLOURS[right], (4, 0, 8, 4))
        image.save(folder / f"images/{name}.png")
        regions = [
            {"box": [0, 0, 4, 4], "phrase": f"the {left} half"},
            {"box": [4, 0, 8, 4], "phrase": f"the {right} half"},
        ]
        rows.append({"image": f"{name}.png", "regions": regions})
    (folder / "regions.json").write_text(json.dumps(rows))
    return folder


def evaluate(folder: Path, *options: str, model: Any) -> int:
    run = str(folder.parent / "run")
    return main([run, "--regions", str(folder), *options], load=lambda path: model)


def scores(folder: Path) -> dict[str, Any]:
    (entry,) = json.loads((folder.parent / "run/scores.json").read_text())["regions"]
    return {score["direction"]: score for score in entry["scores"]}


def test_perfect_model_scores_a_hundred_and_sees_each_thing_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = RegionModel()
    assert evaluate(folder, model=model) == 0
    found = scores(folder)
    # both red halves are right for "the red half"
    to_region, to_phrase = found["phrase to region"], found["region to phrase"]
    assert (to_region["recall_at_1"], to_region["num_queries"], to_region["num_candidates"]) == (100, 3, 4)
    assert (to_phrase["recall_at_1"], to_phrase["num_queries"], to_phrase["num_candidates"]) == (100, 4, 3)
    assert to_region["chance_at_1"] == pytest.approx(100 * (2 + 1 + 1) / 4 / 3)
    assert model.regions == [(0, 0, 4, 4), (4, 0, 8, 4)] * 2
    assert len(model.encoded) == 3 + 4
    assert "Region retrieval" in capsys.readouterr().out


def test_known_confusion_gives_the_known_scores(folder: Path) -> None:
    assert evaluate(folder, model=RegionModel(confused={"green": "red"})) == 0
    found = scores(folder)
    # "green" finds the red halves; for them two phrases tie, for the green half no phrase is right
    assert found["phrase to region"]["recall_at_1"] == pytest.approx(200 / 3)
    assert found["region to phrase"]["recall_at_1"] == pytest.approx(25)


def test_box_beyond_its_image_is_named_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((folder / "regions.json").read_text())
    rows[1]["regions"][1]["box"] = [4, 0, 9, 4]
    (folder / "regions.json").write_text(json.dumps(rows))
    loaded: list[Path] = []
    run = str(folder.parent / "run")
    assert main([run, "--regions", str(folder)], load=lambda path: loaded.append(path) or RegionModel()) == 2
    assert loaded == []
    error = capsys.readouterr().err
    assert "halves/regions.json:row 1: " in error
    assert "box (4, 0, 9, 4) is outside of its image of 8 x 4 pixels" in error
    assert evaluate(folder, "--allow_missing", model=RegionModel()) == 0
    left_out = {name: score["num_queries_left_out"] for name, score in scores(folder).items()}
    assert left_out == {"region to phrase": 2, "phrase to region": 1}


def test_model_without_regions_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder, model=ColourModel()) == 2
    assert "--regions: this model embeds whole images only" in capsys.readouterr().err


def test_vectors_that_are_not_finite_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(RegionModel):
        def _vector(self, item: Item) -> Tensor:
            return super()._vector(item) * (torch.nan if item.box else 1)

    assert evaluate(folder, model=Broken()) == 2
    assert "regions of halves: the model gives embeddings that are not finite" in capsys.readouterr().err
