"""The command: a release's vectors become an index, and what it finds is what the release says itself."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import agff
from agff.embedder import Embedder
from agff.release_writer import save_release
from launcher.embed import main as embed_main
from launcher.embedding import teacher
from launcher.embedding.vectors_folder import VectorsFolder
from launcher.run.trained_model import load_model
from launcher.search import main
from tests.agff.test_release import embedder
from tests.drawings import tiny_backbone

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
TEXTS = ("a red heart", "two blue circles", "nothing")

Search = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release on disk, beside a corpus, its vectors and their index."""
    root = tmp_path_factory.mktemp("search")
    save_release(embedder(tiny_backbone(root / "backbone")), root / "release", origin={})
    (root / "corpus").mkdir()
    rows: list[dict[str, str]] = [{"id": f"text {number}", "text": text} for number, text in enumerate(TEXTS)]
    for colour in COLOURS:
        Image.new("RGB", (64, 48), colour).save(root / "corpus" / f"{colour}.png")
        rows.append({"id": f"{colour}.png", "image": f"{colour}.png"})
    (root / "corpus/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed(root / "release", root / "corpus/rows.jsonl", root / "vectors")
    assert main([str(root / "index"), "--build", str(root / "vectors"), "--fine"]) == 0
    return root / "release"


def embed(model: Path, rows: Path, out: Path, *more: str) -> None:
    options = ["--dtype", "float32", "--num_workers", "0", *more]
    assert embed_main([str(model), str(rows), str(out), *options]) == 0


@pytest.fixture
def search(model: Path, capsys: pytest.CaptureFixture[str]) -> Search:
    def run(*arguments: str, index: Path = model.parent / "index") -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(index), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_search_ranks_as_the_release_does(model: Path, search: Search, tmp_path: Path) -> None:
    """By text, image and both; and the page is written beside the lines."""
    release, root = agff.load(model), model.parent
    corpus_NMD = release.encode([*TEXTS, *(root / "corpus" / f"{name}.png" for name in COLOURS)])
    names = [*(f"text {number}" for number in range(len(TEXTS))), *(f"{name}.png" for name in COLOURS)]
    picture = root / "corpus/blue.png"
    for query, arguments in (
        ("a red heart", ["a red heart", "--k", "9", "--check"]),
        (picture, ["--image", str(picture)]),  # all of a small index
        ({"text": "a heart", "image": picture}, ["a heart", "--image", str(picture), "--factor", "1"]),
    ):
        best = release.similarity(release.encode(query), corpus_NMD)[0].sort(descending=True, stable=True)
        page = tmp_path / "page.html"
        code, out, _ = search(*arguments, "--html", str(page))
        assert code == 0
        lines = [line.split(maxsplit=2) for line in out.splitlines()]
        assert [line[0] for line in lines] == [*(f"{place}." for place in range(1, 10)), "page:"]
        assert [float(line[1]) for line in lines[:-1]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [line[2].split("  ")[0] for line in lines[:-1]] == [names[row] for row in best.indices]
        assert page.read_text().count("data:image/png") == len(COLOURS) + ("--image" in arguments)


def test_recall_is_printed(search: Search) -> None:
    code, out, _ = search("--measure_recall", "5", "--k", "2")
    assert code == 0
    assert out.startswith("recall@2 against the exhaustive fused search: 5 queries of the corpus, each among")
    assert "| every vector | 16 | 8.0 (88.9%) | 100.0 % |" in out
    assert search("--measure_recall")[1].startswith("recall@8 ")  # each among 8 others


def test_queries_of_another_folder_are_measured(model: Path, search: Search, tmp_path: Path) -> None:
    """Embedded in batches of another size, and yet by the same model."""
    embed(model, model.parent / "corpus/rows.jsonl", tmp_path / "queries", "--batch_size", "4")
    code, out, _ = search("--measure_recall", "--queries", str(tmp_path / "queries"), "--k", "9")
    assert code == 0
    assert "9 queries of " in out
    assert "| the global vector | 1 | 9.0 (100.0%) | 100.0 % |" in out
    queries = ("--measure_recall", "--queries", str(tmp_path / "queries"))
    assert search(*queries)[1].startswith("recall@9 ")
    content = bytearray((tmp_path / "queries/vectors.npy").read_bytes())
    content[-2] ^= 1
    (tmp_path / "queries/vectors.npy").write_bytes(content)
    code, _, err = search(*queries, "--check")
    assert code == 2
    assert "queries/vectors.npy: found" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the query is empty; give a text, --image FILE, or both"),
        ([" \n"], "the query is empty"),
        ([], "no query; give a text, --image FILE, or both"),
        (["a", "--k", "10"], "index has 9 items; give at most that many"),
        (["a", "--k", "0"], "--k 0, --factor 4: both must be >= 1"),
        (["a", "--image", "none.png"], "none.png: is missing"),
        (["a \ud83d"], "holds half a surrogate pair"),
        (["<|image_1|>"], "without an image it must not appear"),
        (["a", "--html", "none/page.html"], "--html none/page.html: cannot write the page"),
        (["a", "--model", "none"], "none: the model of "),
        (["a", "--fine"], "--fine: without effect in a search; leave it out"),
        (["a", "--kind", "flat"], "--kind: without effect in a search; leave it out"),
        (["a", "--build", "vectors"], "query: without effect in --build"),
        (["--build", "vectors", "--html", "page.html"], "--html: without effect in --build"),
        (["--build", "vectors", "--factor", "4"], "--factor: without effect in --build"),
        (["--measure_recall", "--factor", "4"], "--factor: without effect in --measure_recall"),
        (["--build", "vectors", "--measure_recall"], "--build and --measure_recall: one at a time"),
        (["--measure_recall", "0"], "--measure_recall 0 must be >= 1"),
        (["--measure_recall", "--k", "9"], "among the other 8 items"),
        (["--measure_recall", "--queries", "none"], "none: no such folder"),
    ],
)
def test_each_mistake_has_its_message(search: Search, arguments: list[str], message: str) -> None:
    code, out, err = search(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert out == ""


def test_a_build_that_fails_prints_its_error_alone(search: Search, tmp_path: Path) -> None:
    code, out, err = search("--build", "none", index=tmp_path / "index")
    assert (code, out) == (2, "")
    assert err.startswith("error: none: no such folder")


def test_a_query_that_is_too_long_is_not_cut_in_silence(search: Search) -> None:
    cut = "the query has a text whose end the model does not read: it is too long"
    assert search("heart " * 10_000, "--k", "1")[1].splitlines()[1:] == [cut]
    assert cut not in search("heart", "--k", "1")[1]


def test_what_the_terminal_cannot_show_is_escaped(
    search: Search, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = model.parent / "index"
    index = index.rename(model.parent / "index \xe9")
    try:
        with io.BytesIO() as content, io.TextIOWrapper(content, encoding="ascii") as terminal:
            monkeypatch.setattr("sys.stdout", terminal)
            assert main([str(index), "--measure_recall", "--queries", str(index / "vectors")]) == 0
            assert rb"index \xe9/vectors" in content.getvalue()
    finally:
        index.rename(model.parent / "index")


def test_a_text_that_names_a_file_is_refused(
    search: Search, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a text means does not depend on the folder: its picture is asked for by --image."""
    monkeypatch.chdir(model.parent / "corpus")
    code, _, err = search("red.png")
    assert code == 2
    assert (
        "'red.png' would be searched as a text, and a file has this name; for its picture give --image" in err
    )
    monkeypatch.chdir(model.parent)
    assert "would be searched" not in search("red.png", "--k", "0")[2]


def test_an_index_of_another_release_is_refused(model: Path, search: Search, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = embedder(model.parent / "backbone")
    torch.nn.init.normal_(other.model.prompted_embedding.vectors, std=0.05)
    save_release(other, tmp_path / "other", origin={})
    code, _, err = search("a red heart", "--model", str(tmp_path / "other"))
    assert code == 2
    assert "the vectors were made by " in err
    assert "other has other weights; name that model" in err
    embed(tmp_path / "other", model.parent / "corpus/rows.jsonl", tmp_path / "vectors")
    code, _, err = search("--measure_recall", "--queries", str(tmp_path / "vectors"))
    assert code == 2
    assert "made by another model than " in err
    assert "other weights_sha256; embed the queries with " in err


def test_vectors_of_a_gpu_are_searched_without_one(
    model: Path, search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU reads the weights in bfloat16, so the query's model does so too."""

    def load_as_on_a_gpu(path: Path) -> Embedder:
        return load_model(path, dtype=torch.bfloat16)

    monkeypatch.setattr(teacher, "load_model", load_as_on_a_gpu)
    embed(model, model.parent / "corpus/rows.jsonl", tmp_path / "vectors")
    assert VectorsFolder(tmp_path / "vectors").description.settings["weights_dtype"] == "bfloat16"
    assert main([str(tmp_path / "index"), "--build", str(tmp_path / "vectors")]) == 0
    code, out, err = search("a red heart", index=tmp_path / "index")
    assert (code, len(out.splitlines())) == (0, 9), err


def test_a_model_that_moved_is_named(model: Path, search: Search, tmp_path: Path) -> None:
    index = shutil.copytree(model.parent / "index", tmp_path / "index")
    moved = model.rename(model.parent / "elsewhere")
    try:
        code, _, err = search("a red heart", index=index)
        assert code == 2
        assert "release: the model of " in err
        assert "is not here; name its folder with --model" in err
        assert search("a red heart", "--model", str(moved), index=index)[0] == 0
    finally:
        moved.rename(model)
