"""Evaluation of a model whose vectors are known: the table, the JSON, the errors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agff.batch import Item
from agff.contract import CONTRACT_FILE
from agff.embedder import Embedder
from agff.errors import CheckpointError
from agff.model_card import SCORES
from agff.nested import Truncations
from agff.similarity import fused_similarity
from data_pipeline.layouts.eval_items import EvalItem
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmeb_sets import SetInfo
from launcher.evaluate import main
from launcher.evaluation import scores
from launcher.evaluation.examples import phrasing
from launcher.evaluation.scores import query_blocks, score_set
from tests.launcher.colours import NOTE, ColourModel, write_benchmarks
from tests.launcher.html_pages import read_page


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


class TwoVectors(ColourModel):
    """The global vector of a text is blind: all images are alike to it. The fine one sees."""

    def encode_inputs(self, inputs: Any) -> Tensor:
        fine_N1D = super().encode_inputs(inputs)
        global_N1D = fine_N1D.clone()
        texts = [number for number, item in enumerate(inputs["items"]) if item.image is None]
        global_N1D[texts] = 3**-0.5
        return torch.cat([global_N1D, fine_N1D], dim=1)

    similarity = Embedder.similarity


def test_the_table_says_what_fine_vectors_bring(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any truncation that was trained; and --similarity global makes it the score of whole items."""
    assert evaluate(benchmarks, model=TwoVectors()) == 0
    whole = json.loads((benchmarks / "run/scores.json").read_text())
    assert [(entry["dim"], entry["num_fine"], entry["scores"]["T2I"]) for entry in whole["truncations"]] == [
        (3, 1, 100),
        (3, 0, 0),
    ]
    assert whole["settings"]["similarity"] == "fused"
    assert "Shorter embeddings" in capsys.readouterr().out
    assert evaluate(benchmarks, "--similarity", "global", model=TwoVectors()) == 0
    scores = json.loads((benchmarks / "run/scores.json").read_text())
    by_name = {score["name"]: score["score"] for score in scores["mmeb"]["sets"]}
    assert by_name["T2I"] == 0
    assert (scores["settings"]["similarity"], scores["truncations"]) == ("global", [])
    assert [other["settings"]["similarity"] for other in scores["other"]] == ["fused"]
    assert "scored by the global vectors alone (--similarity global)." in capsys.readouterr().out


def test_page_and_card_come_of_the_one_encoding(benchmarks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, html, release = ColourModel({"green": "red"}), benchmarks / "report.html", benchmarks / "run"
    (release / CONTRACT_FILE).write_text("{}")
    (release / "README.md").write_text("\n".join(SCORES))
    assert evaluate(benchmarks, "--html", str(html), model=model) == 0
    assert len(model.encoded) == 12 + 7, "as without a page"
    page = read_page(html)
    assert page.one("h1").text == "Scores of run"
    assert [card.attributes["aria-label"] for card in page.all("article", "card")] == [
        "mistake 1 of I2T",
        "mistake 2 of I2T",
        "mistake 1 of T2I",
        "mistake 1 of MMVP",
        "mistake 2 of MMVP",
    ]
    assert capsys.readouterr().out.endswith(f"\nreport: {html}\n")
    card = (release / "README.md").read_text()
    assert "| `T2I` | `retrieval, out of distribution, 3 queries` | 66.7 | 27.2 | 33.3 |" in card

    content = html.read_bytes()
    assert evaluate(benchmarks, "--html", str(html), model=model) == 0
    assert (html.read_bytes(), (release / "README.md").read_text()) == (content, card)


def test_page_that_cannot_be_is_refused_before_anything_is_encoded(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, page = ColourModel(), str(benchmarks / "page.html")
    none = str(benchmarks / "none")
    for options in (
        ["--html", f"{none}/page.html"],
        ["--compare", none],
        ["--html", page, "--compare", none],
        ["--html", page, "--example", "red"],
        ["--html", page, "--out", page],
    ):
        assert evaluate(benchmarks, *options, model=model) == 2
    assert model.encoded == []
    errors = errors_of(capsys)
    assert errors == [
        f"error: --html {none}/page.html: cannot write the page: No such file or directory; choose another "
        "file",
        "error: --compare puts other scores into the HTML report: name its file, --html OUT",
        f"error: {none}: no such file of scores; launcher/evaluate.py writes it",
        "error: --example scores nothing, so there is no page: leave out --html",
        f"error: --html {page}: the scores are there; choose another file",
    ]


def test_the_card_of_another_release_stays(benchmarks: Path) -> None:
    release = benchmarks / "another"
    release.mkdir()
    (release / CONTRACT_FILE).write_text("{}")
    (release / "README.md").write_text("\n".join(SCORES))
    assert evaluate(benchmarks, "--out", str(release / "scores.json"), model=ColourModel()) == 0
    assert (release / "README.md").read_text() == "\n".join(SCORES)


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
    assert ("Find something blue\n", "") in model.encoded
    assert not (benchmarks / "run/scores.json").exists()


def test_phrasing_is_what_all_queries_share() -> None:
    assert phrasing(["Find a photo of a cat\n", "Find a photo of a cow\n", "Find a photo of dogs\n"]) == (
        "Find a photo of ",
        "\n",
    )
    assert phrasing(["cat", "dog\n"]) == ("", "")
    assert phrasing(["Find it\n"]) == ("", "\n")


def test_blocks_cover_every_query_and_share_candidates_where_that_costs_little() -> None:
    shared = [tuple(range(10))] * 70
    apart = [(100 + 2 * row, 101 + 2 * row) for row in range(64)]
    blocks = list(query_blocks([*shared, *apart]))
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 64), (64, 128), (128, 134)]
    assert [together and len(together) for _, together in blocks] == [10, None, 12]
    assert list(query_blocks([])) == []


def eval_set(candidates: Sequence[tuple[int, ...]], *, num_items: int) -> EvalSet:
    return EvalSet(
        name="S",
        info=SetInfo(meta_task="vqa", in_distribution=True),
        items=tuple(EvalItem(str(index)) for index in range(num_items)),
        addresses=tuple(f"S/test.parquet:row {index}" for index in range(num_items)),
        findings={},
        queries=tuple(range(len(candidates))),
        candidates=tuple(candidates),
    )


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize("waste", [0, 100], ids=["own candidates", "shared candidates"])
def test_score_does_not_depend_on_blocks(
    monkeypatch: pytest.MonkeyPatch, num_vectors: int, waste: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    items_NMD = torch.randn(40, num_vectors, 8, generator=generator)
    candidates = [tuple(torch.randperm(40, generator=generator)[: 3 + row % 4].tolist()) for row in range(30)]
    model = ColourModel()
    hits = 0
    for query, (truth, *others) in enumerate(candidates):
        best, *rest = (
            fused_similarity(items_NMD[[query]].double(), items_NMD[[item]].double(), beta=0.1).item()
            for item in (truth, *others)
        )
        hits += all(best > other for other in rest)
    monkeypatch.setattr(scores, "MOST_WASTE", waste)
    monkeypatch.setattr(scores, "OWN_BLOCK_BYTES", 4 * 6 * items_NMD[0].nbytes)  # several blocks of rows
    monkeypatch.setattr(ColourModel, "similarity", Embedder.similarity)
    found = score_set(model, eval_set(candidates, num_items=40), items_NMD)
    assert 0 < hits < 30
    assert found.score == pytest.approx(100 * hits / 30)


def test_queries_with_candidates_of_their_own_are_scored_by_batched_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not one by one: 1,000 of them took 16.5 s at K = 4, D = 1,536."""
    products: list[tuple[int, ...]] = []

    class Counting(ColourModel):
        def similarity_to_own(self, query_BMD: Tensor, own_BCMD: Tensor) -> Tensor:
            products.append(tuple(own_BCMD.shape))
            return super().similarity_to_own(query_BMD, own_BCMD)

        def similarity(self, a_NMD: Tensor, b_CMD: Tensor) -> Tensor:
            raise AssertionError("one by one")

    candidates = [tuple(range(128 + 10 * row, 138 + 10 * row)) for row in range(128)]
    score_set(Counting(), eval_set(candidates, num_items=1500), torch.randn(1500, 1, 4))
    assert products == [(64, 10, 1, 4)] * 2


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
