"""MM-GEM by its commands: a run, its release, and what both say."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import agff
from agff.cider import CiderD
from agff.embedder import Embedder
from agff.errors import ConfigError
from agff.nested import Truncations
from launcher.evaluate import main as evaluate
from launcher.evaluation.caption_quality import MAX_TOKENS
from launcher.run.config_file import read_recipe
from launcher.run.data import build_processor
from launcher.run.trained_model import load_run
from tests.launcher.runs import SMALL_RECIPE, run_command

pytestmark = pytest.mark.timeout(600)
BOXES = [(0.0, 0.0, 50.0, 40.0), (30.0, 20.0, 100.0, 80.0)]


def test_it_does_not_train_on_texts_alone(project: Path) -> None:
    config = read_recipe(
        Path("launcher/recipes/quickstart_mm_gem1.yaml"),
        [
            ("backbone.path", str(project / ".cache/quickstart/backbone")),
            ("backbone.text_only", "true"),
            ("backbone.freeze_vision", "true"),
        ],
    )
    with pytest.raises(ConfigError, match="text_only=true, but objective=mm_gem learns from images"):
        build_processor(config)


def test_the_first_stage_learns_from_bare_captions_alone() -> None:
    """MMEB's text queries (`_t2i`) hold their instruction in one text with the caption."""
    weights = read_recipe(Path("launcher/recipes/mm_gem_stage1.yaml")).data.weights
    assert weights
    assert all(name.endswith("_i2t") for name in weights)


def everything(model: Embedder) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    picture = Image.linear_gradient("L").resize((100, 80)).convert("RGB")
    captions = [
        *model.caption(picture, max_tokens=8),
        *model.caption(picture, BOXES, max_tokens=8, num_beams=2),
    ]
    return model.encode(["a heart", picture]), model.encode_regions(picture, BOXES), captions


def test_a_run_and_its_release_give_the_same_vectors_and_say_the_same(project: Path) -> None:
    recipe = {**SMALL_RECIPE, "name": "mm", "objective": "mm_gem", "prompts": {"num_fine": 0}}
    recipe |= {"num_steps": 2, "precision": "fp32", "loss": {"nested_dims": [8]}}
    (project / "mm.yaml").write_text(yaml.safe_dump(recipe))
    for command in (
        "deepspeed launcher/train.py --recipe mm.yaml --run_dir runs/mm",
        "python launcher/convert_checkpoint.py runs/mm releases/mm",
    ):
        result = run_command(command, project)
        assert result.returncode == 0, result.stdout
    embedder, step = load_run(project / "runs/mm")
    assert step == 2
    vectors, regions, captions = everything(embedder)
    released = everything(agff.load(project / "releases/mm"))
    torch.testing.assert_close(released[0], vectors, rtol=0, atol=1e-6)
    torch.testing.assert_close(released[1], regions, rtol=0, atol=1e-6)
    assert released[2] == captions
    check_truncations(project / "releases/mm", vectors)
    quality, regions = scored(project, agff.load(project / "releases/mm"))
    assert quality == {"num_images": 2, "num_references": 2}
    assert regions == [4, 4]


def check_truncations(release: Path, whole_NMD: torch.Tensor) -> None:
    """The release says which it was trained for, and gives them."""
    assert "`dim` of 8." in (release / "README.md").read_text()
    model = agff.load(release)
    assert model.truncations == Truncations(dims=[8])
    short = model.encode(["a heart"], dim=8)
    torch.testing.assert_close(
        short, torch.nn.functional.normalize(whole_NMD[:1, :, :8], dim=-1), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="dim=9 was not trained; this model was trained for 8, "):
        model.encode(["a heart"], dim=9)


def scored(project: Path, model: Embedder) -> tuple[dict[str, int], list[int]]:
    """What the evaluation says of the release's captions and regions, compared with its own."""
    folder, captions = project / "mm_regions", project / "mm_captions"
    for root in (folder, captions):
        (root / "images").mkdir(parents=True)
    pictures = [Image.linear_gradient("L").resize((100, 80)).convert("RGB").rotate(90 * n) for n in (0, 2)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"images/{number}.png")
        picture.save(captions / f"images/{number}.png")
    rows = [
        {"image": f"{number}.png", "regions": [{"box": box, "phrase": f"{number} {box}"} for box in BOXES]}
        for number in range(2)
    ]
    (folder / "regions.json").write_text(json.dumps(rows))
    table = pa.table({"image": ["0.png", "1.png"], "text": ["a dark top", "a bright top"]})
    pq.write_table(table, captions / "test.parquet")
    release = str(project / "releases/mm")
    options = ["--caption_quality", str(captions), "--regions", str(folder)]
    assert evaluate([release, *options, "--out", str(folder / "scores.json")]) == 0
    found = json.loads((folder / "scores.json").read_text())
    (quality,), (regions,) = found["caption_quality"], found["regions"]
    said = [model.caption(picture, max_tokens=MAX_TOKENS)[0] for picture in pictures]
    score = quality["scores"][0]
    judge = CiderD([["a dark top"], ["a bright top"]])
    assert score["cider_d"] == pytest.approx(sum(judge.scores(said)) / 2)
    return {name: score[name] for name in ("num_images", "num_references")}, [
        direction["num_queries"] for direction in regions["scores"]
    ]
