"""mteb and our own evaluation agree on every query of a release."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from agff.mteb_model import MtebModel
from agff.release import load
from agff.scoring import precision_at_1_hits
from data_pipeline.layouts.mmeb_eval import EvalSet, read_eval_set
from data_pipeline.layouts.mmeb_sets import find_eval_sets
from launcher.encoding.items import encode_items
from launcher.evaluation.scores import encode_used, score_set

mteb = pytest.importorskip("mteb", reason="runs in the environment of `make test-ecosystem`")
datasets = pytest.importorskip("datasets")

from mteb.abstasks import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.image import AbsTaskImageTextPairClassification  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import EncoderProtocol  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
MAX_TOKENS = 40
"""Of the release."""
INSTRUCTION = {
    "Shapes_t2i-eval": ("t2i", "Find a photo of"),
    "Shapes_i2t-eval": ("i2t", "Name it."),
    "Shapes_VQA-eval": ("it2t", "What"),
}
"""Per set the kinds of its two sides, and how each of its queries begins."""
Score = Mapping[str, float]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What write_mteb_release.py writes."""
    folder = tmp_path_factory.mktemp("mteb")
    python = os.environ.get("AGFF_PYTHON", str(ROOT / ".venv/bin/python"))
    subprocess.run([python, "-m", "tests.ecosystem.write_mteb_release", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def release(written: Path) -> Path:
    return written / "release"


@pytest.fixture(scope="module")
def model(release: Path) -> MtebModel:
    return MtebModel(release)


@pytest.fixture(scope="module")
def eval_sets(written: Path) -> dict[str, EvalSet]:
    root = written / "mmeb_eval"
    return {
        name: read_eval_set(root, name, info, images_root=None, max_queries=None)
        for name, info in find_eval_sets(root).items()
    }


def metadata(name: str, category: str, **values: Any) -> TaskMetadata:
    letters = {"t": "text", "i": "image"}
    return TaskMetadata(
        **{
            "name": name.replace("-", ""),
            "description": "drawings",
            "reference": None,
            "dataset": {"path": "nowhere", "revision": "0"},
            "type": "Any2AnyRetrieval",
            "category": category,
            "modalities": sorted({letters[letter] for letter in category if letter in letters}),
            "eval_splits": ["test"],
            "eval_langs": ["eng-Latn"],
            "main_score": "hit_rate_at_1",
            "bibtex_citation": None,
            **values,
        }
    )


def retrieval_task(
    task_metadata: TaskMetadata,
    queries: Mapping[str, Sequence[Any]],
    corpus: Mapping[str, Sequence[Any]],
    top_ranked: Mapping[str, list[str]],
) -> Any:
    """An offline task whose truths are the first of the candidates; `hits` has hit_rate_at_1 of each query,
    `scores` the predictions."""

    class Task(AbsTaskRetrieval):
        metadata = task_metadata

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            self.dataset = {
                "default": {
                    "test": {
                        "queries": table(queries),
                        "corpus": table(corpus),
                        "relevant_docs": {query: {ids[0]: 1} for query, ids in top_ranked.items()},
                        "top_ranked": dict(top_ranked),
                    }
                }
            }
            self.data_loaded = True

        def task_specific_scores(
            self, scores: Mapping[str, Score], qrels: Any, results: Mapping[str, Score], **_: Any
        ) -> dict[str, float]:
            self.hits = {query: bool(score["success_1"]) for query, score in scores.items()}
            self.scores = results
            return {}

    return Task()


def table(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Columns as a data set has them; images are paths, decoded when they are read."""
    made = datasets.Dataset.from_dict(dict(columns))
    return made.cast_column("image", datasets.Image()) if "image" in columns else made


def evaluate(model: MtebModel, task: Any) -> dict[str, Any]:
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    return scores


def columns_of(eval_set: EvalSet, items: Sequence[int], kinds: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"id": [f"{item:04}" for item in items]}
    if "t" in kinds:
        columns["text"] = [eval_set.items[item].text for item in items]
    if "i" in kinds:
        columns["image"] = [str(eval_set.items[item].image) for item in items]
    return columns


def task_of(eval_set: EvalSet, spelling: str) -> Any:
    """One of our sets as a task of mteb, whose instructions are spelled in one of three ways."""
    category, instruction = INSTRUCTION[eval_set.name]
    query_kinds, target_kinds = category.split("2")
    prompt = None
    if spelling == "complete texts":
        query_kinds, target_kinds = (kinds + "t" * (kinds == "i") for kinds in (query_kinds, target_kinds))
    queries = columns_of(eval_set, eval_set.queries, query_kinds)
    queries["id"] = [f"q{number}" for number in range(len(eval_set.queries))]
    targets = sorted({item for candidates in eval_set.candidates for item in candidates})
    corpus = columns_of(eval_set, targets, target_kinds)
    if spelling != "complete texts":
        if "text" in queries:
            queries["text"] = [bare(text, instruction) for text in queries["text"]]
        if spelling == "prompt":
            prompt = {"query": instruction}
        else:
            queries["instruction"] = [instruction] * len(eval_set.queries)
    return retrieval_task(
        metadata(eval_set.name, f"{query_kinds}2{target_kinds}", prompt=prompt),
        queries,
        corpus,
        {
            query: [f"{item:04}" for item in candidates]
            for query, candidates in zip(queries["id"], eval_set.candidates, strict=True)
        },
    )


def bare(text: str, instruction: str) -> str:
    """A complete text without its instruction and without the image's place."""
    _, found, rest = text.partition(instruction)
    assert found, text
    return rest.strip()


@pytest.mark.parametrize("spelling", ["complete texts", "prompt", "instruction column"])
@pytest.mark.parametrize("name", INSTRUCTION)
def test_every_query_is_a_hit_in_both_or_in_none(
    name: str, spelling: str, model: MtebModel, release: Path, eval_sets: Mapping[str, EvalSet]
) -> None:
    eval_set, task = eval_sets[name], task_of(eval_sets[name], spelling)
    scores = evaluate(model, task)
    ours = load(release)
    items_NMD, refused = encode_used(functools.partial(encode_items, ours, batch_size=5), eval_set)
    assert not refused
    hits = []
    for number, (query, candidates) in enumerate(zip(eval_set.queries, eval_set.candidates, strict=True)):
        wanted = ours.similarity(items_NMD[[query]], items_NMD[list(candidates)])[0]
        found = task.scores[f"q{number}"]
        found_C = torch.tensor([found[f"{item:04}"] for item in candidates])
        # other batches, so other sums: the last bits
        torch.testing.assert_close(found_C, wanted, rtol=0, atol=1e-5)
        hits.append(bool((wanted[0] > wanted[1:]).all()))
    assert list(task.hits.values()) == hits
    assert 0 < sum(hits) < len(hits), "such a set shows nothing"
    assert 100 * scores["hit_rate_at_1"] == pytest.approx(
        score_set(ours, eval_set, items_NMD).score, abs=1e-3
    )


@pytest.mark.parametrize("truth", ["a", "z"])
def test_a_tie_is_a_miss_for_us_and_a_hit_for_mteb_where_the_truth_has_the_larger_id(
    truth: str, model: MtebModel
) -> None:
    """Texts that are equal up to the limit of tokens have equal vectors."""
    long = "a red circle " * MAX_TOKENS
    texts = {truth: f"{long}once", "m": f"{long}twice"}
    corpus = {"id": list(texts), "text": list(texts.values())}
    task = retrieval_task(
        metadata("Ties", "t2t"), {"id": ["q"], "text": ["a circle"]}, corpus, {"q": [truth, "m"]}
    )
    evaluate(model, task)
    assert task.scores["q"][truth] == task.scores["q"]["m"]
    assert task.hits == {"q": truth == "z"}
    similarity_12 = model.embedder.similarity(*map(model.embedder.encode, (["a circle"], texts.values())))
    assert precision_at_1_hits(similarity_12, [[0, 1]]) == [False]


def test_a_search_of_the_whole_corpus_is_by_the_fused_similarity(
    model: MtebModel, eval_sets: Mapping[str, EvalSet]
) -> None:
    eval_set, task = eval_sets["Shapes_t2i-eval"], task_of(eval_sets["Shapes_t2i-eval"], "prompt")
    task.load_data()
    task.dataset["default"]["test"]["top_ranked"] = None
    scores = evaluate(model, task)
    items_NMD, _ = encode_used(functools.partial(encode_items, model.embedder, batch_size=5), eval_set)
    assert all(set(candidates) == set(eval_set.candidates[0]) for candidates in eval_set.candidates)
    score = score_set(model.embedder, eval_set, items_NMD).score
    assert 100 * scores["hit_rate_at_1"] == pytest.approx(score, abs=1e-3)


def test_a_task_of_pairs_compares_the_global_vectors(
    model: MtebModel, eval_sets: Mapping[str, EvalSet]
) -> None:
    """SugarCrepe's: the caption and a wrong one of each image."""
    eval_set = eval_sets["Shapes_i2t-eval"]
    pictures = [Image.open(str(eval_set.items[query].image)) for query in eval_set.queries]
    captions = [[eval_set.items[item].text for item in row[:2]] for row in eval_set.candidates]

    class Pairs(AbsTaskImageTextPairClassification):
        metadata = metadata(
            "Pairs", "i2t", type="Compositionality", modalities=["text", "image"], main_score="text_acc"
        )
        images_column_names = ("image",)
        texts_column_names = ("caption", "wrong")

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            columns = {
                "image": pictures,
                "caption": [c for c, _ in captions],
                "wrong": [w for _, w in captions],
            }
            self.dataset = {"test": datasets.Dataset.from_dict(columns)}
            self.data_loaded = True

    scores = evaluate(model, Pairs())
    images_ND = model.embedder.encode(pictures)[:, 0]
    captions_N2D = model.embedder.encode([text for pair in captions for text in pair])[:, 0].view(-1, 2, 32)
    similarity_N2 = (captions_N2D @ images_ND[:, :, None])[..., 0]
    hits_N = similarity_N2[:, 0] > similarity_N2[:, 1]
    assert 0 < hits_N.sum() < len(hits_N)
    assert scores["text_acc"] == pytest.approx(hits_N.float().mean().item())


def test_what_mteb_records_of_a_release(model: MtebModel, release: Path) -> None:
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.name, meta.revision) == ("agff/release", model.revision)
    assert (meta.embed_dim, meta.max_tokens, meta.modalities) == (32, MAX_TOKENS, ["text", "image"])
    assert (meta.similarity_fn_name, meta.model_type) == ("custom", ["late-interaction"])
    assert meta.n_parameters == sum(weight.numel() for weight in model.embedder.model.state_dict().values())
    short = MtebModel(release, dim=8, num_fine=0, name="ours/tiny", license="apache-2.0").mteb_model_meta
    assert (short.name, short.license, short.embed_dim) == ("ours/tiny", "apache-2.0", 8)
    assert (short.similarity_fn_name, short.model_type) == ("cosine", ["dense"])
    assert short.experiment_kwargs == {"dim": 8, "num_fine": 0}
    with pytest.raises(ValueError, match="licence"):
        _ = MtebModel(release, licence="apache-2.0").mteb_model_meta


def test_a_cache_of_results_keeps_those_of_each_truncation_apart(
    model: MtebModel, release: Path, eval_sets: Mapping[str, EvalSet], tmp_path: Path
) -> None:
    cache, found = mteb.ResultCache(tmp_path), []
    for evaluated in (model, MtebModel(release, dim=8, num_fine=0), model):
        task = task_of(eval_sets["Shapes_i2t-eval"], "prompt")
        result = mteb.evaluate(evaluated, task, cache=cache, co2_tracker=False, show_progress_bar=False)
        found.append((result.task_results[0].get_score(), hasattr(task, "hits")))
    assert found[0][0] == found[2][0] != found[1][0]
    assert [was_run for _, was_run in found] == [True, True, False]
