"""A run on texts alone from a teacher's vectors to a release, by the commands that a person types."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import agff
from launcher.convert_checkpoint import main as convert_main
from launcher.embed import main as embed_main
from launcher.run.trained_model import load_run
from tests.launcher.embedding.sentence_folders import write_sentence_model
from tests.launcher.runs import run_command

RUN = (
    "deepspeed launcher/train.py --recipe quickstart_unime1 --backbone.path .cache/quickstart/backbone "
    "--data.shards .cache/quickstart/shards --data.vectors vectors_of_texts "
    "--batch.global_batch_size 16 --data.sub_batch_size 8 --batch.chunk_size auto --num_steps 3 "
    "--optimizer.warmup_steps 1 --run_dir runs/texts"
)


@pytest.mark.timeout(300)
def test_a_run_on_texts_learns_from_vectors_and_its_release_embeds_images(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    teacher = write_sentence_model(tmp_path / "teacher")
    argv = [str(teacher), ".cache/quickstart/shards", "vectors_of_texts", "--sources", "Shapes_text"]
    assert embed_main(argv) == 0
    refused = run_command(f"{RUN} --data.weights null", project)
    assert refused.returncode == 2
    assert "no vectors of source Shapes_VQA" in refused.stdout
    result = run_command(f"{RUN} --data.weights '{{Shapes_text: 1}}'", project)
    assert result.returncode == 0, result.stdout
    assert convert_main(["runs/texts", str(tmp_path / "release")]) == 0, capsys.readouterr().err
    items = [Image.new("RGB", (56, 56), "red"), "one red circle"]
    released, of_run = agff.load(tmp_path / "release").encode(items), load_run(Path("runs/texts"))[0]
    assert released.shape == (2, 1, 32)
    assert (released - of_run.encode(items)).abs().max() < 1e-5
