"""Evaluation of a model whose vectors are known: the table, the JSON, the errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agff.batch import Item
from agff.errors import CheckpointError
from agff.nested import Truncations
from data_pipeline.layouts.eval_items import EvalItem
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmeb_sets import SetInfo
from launcher.evaluate import main
from launcher.evaluation.examples import phrasing
from launcher.evaluation.scores import query_blocks, score_set
from tests.launcher.colours import NOTE, ColourModel, write_benchmarks


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    return write_benchmarks(tmp_path)


def evaluate(benchmarks: Path, *options: str, model: ColourModel, mmvp: bool = True) -> int:
    arguments = [str(benchmarks / "run"), "--mmeb_eval", str(benchmarks / "mmeb"), *options]
    if mmvp:
        arguments += ["--mmvp", str(benchmarks / "mmvp")]
    return main(arguments, load=lambda path: model)


def test_perfect_model_scores_a_hundred(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(benchmarks, model=ColourModel()) == 0
    scores = json.loads((benchmarks / "run/scores.json").read_text())
    assert scores["mmeb"]["overall"]["score"] == 100
    assert scores["mmvp"]["average"]["score"] == 100
    assert scores["notes"] == [NOTE]
    assert (scores["num_mmeb_queries"], scores["num_mmvp_pairs"]) == (6, 2)
    out = capsys.readouterr().out
    assert f"Note: {NOTE}" in out
    assert out.count(NOTE) == 1


def test_known_confusion_gives_the_known_scores(benchmarks: Path) -> None:
    # "green" names red: text -> image misses one of three; for the red image "red" and "green" tie, for the
    # green one no text is right; and both pairs hold a "green" that picks the wrong image or none
    assert evaluate(benchmarks, model=ColourModel({"green": "red"})) == 0
    scores = json.loads((benchmarks / "run/scores.json").read_text())
    by_name = {score["name"]: score["score"] for score in scores["mmeb"]["sets"]}
    assert by_name == {"I2T": pytest.approx(100 / 3), "T2I": pytest.approx(200 / 3)}
    assert scores["mmeb"]["overall"]["score"] == pytest.approx(50)
    assert scores["mmvp"]["average"]["score"] == 0


def test_each_item_is_encoded_once_and_in_small_batches(benchmarks: Path) -> None:
    model = ColourModel()
    evaluate(benchmarks, "--batch_size", "2", model=model, mmvp=False)
    assert len(model.encoded) == len(set(model.encoded)) == 12
    assert max(model.batch_sizes) == 2


def test_each_trained_truncation_is_scored_from_one_encoding(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ColourModel()
    model.truncations = Truncations(dims=[1, 2])
    assert evaluate(benchmarks, model=model) == 0
    scores = json.loads((benchmarks / "run/scores.json").read_text())
    # one number tells nothing apart, two (red and green) nothing from blue, which becomes a zero vector
    assert [(entry["dim"], entry["num_fine"], entry["scores"]) for entry in scores["truncations"]] == [
        (3, 0, {"I2T": 100, "T2I": 100, "MMVP": 100}),
        (2, 0, {"I2T": pytest.approx(200 / 3), "T2I": pytest.approx(200 / 3), "MMVP": 50}),
        (1, 0, {"I2T": pytest.approx(100 / 3), "T2I": pytest.approx(100 / 3), "MMVP": 0}),
    ]
    assert (scores["mmeb"]["overall"]["score"], len(model.encoded)) == (100, 12 + 7)
    out = capsys.readouterr().out
    assert "Shorter embeddings" in out
    assert re.search(r"\n2 +0 +2 +66.7 +50.0\n", out)


def test_max_queries_is_said_with_the_scores(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(benchmarks, "--max_queries", "1", "--out", str(benchmarks / "part/s.json"), model=ColourModel())
    assert json.loads((benchmarks / "part/s.json").read_text())["num_mmeb_queries"] == 2
    assert "only the first 1 queries" in capsys.readouterr().out
    assert not (benchmarks / "run/scores.json").exists()


def test_sets_scored_in_another_run_are_kept_and_shown(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mmvp = str(benchmarks / "run"), str(benchmarks / "mmvp")
    assert evaluate(benchmarks, model=ColourModel(), mmvp=False) == 0
    assert main([run, "--mmvp", mmvp], load=lambda path: ColourModel()) == 0
    scores = json.loads((benchmarks / "run/scores.json").read_text())
    assert (scores["mmeb"]["overall"]["score"], scores["mmvp"]["average"]["score"]) == (100, 100)
    out = capsys.readouterr().out
    assert "Note: from earlier runs of the same weights and settings: I2T, T2I." in out
    assert out.count("\nT2I  ") == 2

    assert evaluate(benchmarks, "--max_queries", "2", model=ColourModel(), mmvp=False) == 0
    scores = json.loads((benchmarks / "run/scores.json").read_text())
    assert (scores["num_mmeb_queries"], scores["mmvp"]) == (4, None)
    assert [other["num_mmeb_queries"] for other in scores["other"]] == [6]
    note = 'scores.json also keeps the scores of 1 other weights or settings, under "other".'
    assert note in capsys.readouterr().out.replace("\n", " ")


def test_place_of_the_scores_is_tried_before_anything_is_read(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_load(path: Path) -> ColourModel:
        raise AssertionError("loaded")

    (benchmarks / "a_file").touch()
    out = benchmarks / "a_file" / "scores.json"
    gone, nowhere = benchmarks / "gone", str(benchmarks / "nowhere")
    assert main([str(benchmarks / "run"), "--mmeb_eval", nowhere, "--out", str(out)], load=no_load) == 2
    assert main([str(gone), "--mmeb_eval", nowhere], load=no_load) == 2
    assert not gone.exists()
    errors = errors_of(capsys)
    assert errors[0].startswith(f"error: {out}: scores cannot be written there: ")
    assert errors[1] == f"error: {gone}: no such folder; name a run or a release"


def test_shown_example_ranks_candidates_and_marks_the_truth(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(benchmarks, "--show", "2", model=ColourModel({"green": "red"}), mmvp=False)
    out = capsys.readouterr().out
    assert 'T2I: "Find red": truth at rank 1 of 3\n  1.  +1.000  red (red)  <- truth\n' in out
    assert 'T2I: "Find green"' in out
    assert "Find blue" not in out


def test_free_text_finds_its_image_and_scores_nothing(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ColourModel()
    assert evaluate(benchmarks, "--example", "something blue", model=model, mmvp=False) == 0
    assert 'T2I, 3 candidates: "Find something blue"\n  1.  +1.000  blue (blue)\n' in capsys.readouterr().out
    assert model.encoded[0] == ("Find something blue\n", "")
    assert not (benchmarks / "run/scores.json").exists()


def test_phrasing_is_what_all_queries_share() -> None:
    assert phrasing(["Find a photo of a cat\n", "Find a photo of a cow\n", "Find a photo of dogs\n"]) == (
        "Find a photo of ",
        "\n",
    )
    assert phrasing(["cat", "dog\n"]) == ("", "")
    assert phrasing(["Find it\n"]) == ("", "\n")


def test_blocks_cover_every_query_and_waste_at_most_half() -> None:
    shared = [(0, 1, 2), (1, 0, 2), (2, 1, 0)]
    apart = [(10, 11), (20, 21), (30, 31), (30, 32)]
    blocks = list(query_blocks([*shared, *apart], max_rows=64))
    assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == list(range(7))
    for rows, columns in blocks:
        for candidates in [*shared, *apart][rows]:
            assert set(candidates) <= set(columns)
            assert len(columns) <= 2 * len(candidates)
    assert blocks[0][0].stop >= 3
    assert [rows.stop - rows.start for rows, _ in query_blocks([(0, 1)] * 5, max_rows=2)] == [2, 2, 1]
    assert list(query_blocks([], max_rows=2)) == []


def test_score_does_not_depend_on_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    items_NMD = torch.randn(40, 1, 8, generator=generator)
    candidates = tuple(tuple(torch.randperm(40, generator=generator)[:5].tolist()) for _ in range(30))
    eval_set = EvalSet(
        name="S",
        info=SetInfo(meta_task="vqa", in_distribution=True),
        items=tuple(EvalItem(str(index)) for index in range(40)),
        addresses=tuple(f"S/test.parquet:row {index}" for index in range(40)),
        findings={},
        queries=tuple(range(30)),
        candidates=candidates,
    )
    hits = 0
    for query, (truth, *others) in enumerate(candidates):
        best = float(items_NMD[query, 0] @ items_NMD[truth, 0])
        hits += all(best > float(items_NMD[query, 0] @ items_NMD[other, 0]) for other in others)
    assert score_set(ColourModel(), eval_set, items_NMD).score == pytest.approx(100 * hits / 30)


def errors_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed beside the progress bars."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "  "))]


def test_errors_are_one_line_and_exit_code_2(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def no_model(path: Path) -> ColourModel:
        raise CheckpointError(f"{path}: no checkpoint")

    run, mmeb = str(benchmarks / "run"), str(benchmarks / "mmeb")
    assert main([run], load=no_model) == 2
    assert main([run, "--mmeb_eval", mmeb], load=no_model) == 2
    assert main([run, "--mmeb_eval", run], load=no_model) == 2
    assert main([run, "--mmvp", str(benchmarks / "mmvp"), "--show", "1"], load=no_model) == 2
    assert main([run, "--mmvp", str(benchmarks / "mmvp"), "--max_queries", "1"], load=no_model) == 2
    assert main([run, "--mmeb_eval", mmeb, "--mmeb_images", f"{run}/none"], load=no_model) == 2
    errors = errors_of(capsys)
    assert errors[4:] == [
        "error: --mmeb_images and --max_queries are about MMEB's sets: name --mmeb_eval DIR too",
        f"error: {run}/none: no such folder (--mmeb_images)",
    ]
    assert errors[0] == (
        "error: nothing to score: name --mmeb_eval DIR or --mmvp DIR or --captions DIR or --regions DIR or "
        "--caption_quality DIR"
    )
    assert errors[1] == f"error: {run}: no checkpoint"
    assert errors[2] == f"error: {run}: found no <SET>/*.parquet"
    assert errors[3].startswith("error: --show and --example need a set of texts with images")


def test_embeddings_that_are_not_finite_are_refused(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(ColourModel):
        def _vector(self, item: Item) -> Tensor:
            return torch.full((3,), torch.nan)

    assert evaluate(benchmarks, model=Broken()) == 2
    assert "error: I2T: the model gives embeddings that are not finite" in capsys.readouterr().err


def test_batch_size_must_be_positive(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate(benchmarks, "--batch_size", "0", model=ColourModel())
    assert "0 must be >= 1" in capsys.readouterr().err
