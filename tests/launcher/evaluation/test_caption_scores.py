"""Caption sets through the command: tables, JSON, left-out items; and the scores of a real model against
slow loops."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from agff.backbone import load_backbone
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.nested import Truncations
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
from data_pipeline.layouts.caption_folders import find_caption_sets
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.sugarcrepe import SUBSETS
from launcher.encoding.items import encode_items
from launcher.evaluate import main
from launcher.evaluation.caption_scores import score_captions
from launcher.evaluation.scores import encode_used
from tests.captions import write_sharegpt4v, write_sugarcrepe, write_tables, write_urban1k
from tests.drawings import tiny_backbone
from tests.launcher.colours import COLOURS, ColourModel, write_benchmarks


class FineColourModel(ColourModel):
    """With a second vector: the global one of a text is blind, so that only the fused similarity finds its
    image."""

    def _vectors(self, vector_3: Tensor, *, is_image: bool) -> Tensor:
        return torch.stack([vector_3 if is_image else torch.ones(3), vector_3])

    def encode_inputs(self, inputs: Any) -> Tensor:
        items = inputs["items"]
        vectors_N3 = super().encode_inputs(inputs)[:, 0]
        return torch.stack(
            [
                self._vectors(vector, is_image=item.image is not None)
                for vector, item in zip(vectors_N3, items, strict=True)
            ]
        )

    def similarity(self, a_NMD: Tensor, b_CMD: Tensor) -> Tensor:
        return torch.einsum("nmd,cpd->ncmp", a_NMD, b_CMD)[:, :, -1, -1]


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    """{colour: a file of exactly that colour}, a PNG inside whatever its name says."""
    (tmp_path / "drawn").mkdir()
    files = {name: tmp_path / f"drawn/{number}{name}.jpg" for number, name in enumerate(COLOURS)}
    for name, file in files.items():
        Image.new("RGB", (8, 8), COLOURS[name]).save(file, format="PNG")
    return {name: str(file) for name, file in files.items()}


def write_all(root: Path, images: dict[str, str]) -> Path:
    write_tables(root / "flickr30k", {file: [f"a {n} one", f"all {n}"] for n, file in images.items()})
    write_tables(root / "coco", {file: [f"some {n}"] for n, file in images.items()}, in_table=False)
    folder = write_sharegpt4v(root / "sharegpt", [(f"{n}.jpg", f"very {n}") for n in images])
    for name, file in images.items():
        (folder / f"{name}.jpg").write_bytes(Path(file).read_bytes())
    write_urban1k(root / "urban", {file: [f"{n} town"] for n, file in images.items()})
    others = dict(zip(images, [*list(images)[1:], next(iter(images))], strict=True))
    write_sugarcrepe(root / "sugar", [(file, f"{n} thing", others[n]) for n, file in images.items()])
    (root.parent / "run").mkdir()
    return root


def evaluate(root: Path, *options: str, model: Any) -> int:
    run = str(root.parent / "run")
    return main([run, "--captions", str(root), *options], load=lambda path: model)


def scores(root: Path) -> Any:
    return json.loads((root.parent / "run/scores.json").read_text())


def recalls(root: Path, name: str, field: str = "recall_at_1") -> dict[tuple[str, str], float]:
    entry = next(entry for entry in scores(root)["captions"] if entry["name"] == name)
    return {(score["direction"], score["similarity"]): score[field] for score in entry["scores"]}


T2I, I2T = "text to image", "image to text"


def test_each_trained_truncation_is_scored_on_every_layout(tmp_path: Path, images: dict[str, str]) -> None:
    root = write_all(tmp_path / "sets", images)
    model = FineColourModel()
    model.truncations = Truncations(fine=[0])
    assert evaluate(root, model=model) == 0
    whole, blind = scores(root)["truncations"]
    names = [f"{name}, {to}" for name in ("COCO", "Flickr30k", "ShareGPT4V", "Urban1k") for to in (T2I, I2T)]
    names += [f"SugarCrepe, {subset}" for subset in SUBSETS]
    assert (whole["num_fine"], blind["num_fine"]) == (1, 0)
    assert whole["scores"] == dict.fromkeys(names, 100)
    assert blind["scores"] == dict.fromkeys(names, 0), "the global vector of a text says nothing"


def test_perfect_model_scores_a_hundred_on_every_layout(
    tmp_path: Path, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_all(tmp_path / "sets", images)
    assert evaluate(root, model=ColourModel()) == 0
    found = scores(root)
    assert [entry["name"] for entry in found["captions"]] == ["COCO", "Flickr30k", "ShareGPT4V", "Urban1k"]
    for entry in found["captions"]:
        assert [(s["direction"], s["similarity"], s["recall_at_1"]) for s in entry["scores"]] == [
            (T2I, "global", 100),
            (I2T, "global", 100),
        ]
    (sugar,) = found["choices"]
    assert [(s["subset"], s["score"], s["num_pairs"]) for s in sugar["scores"]] == [
        (s, 100, 3) for s in SUBSETS
    ]
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["Flickr30k", *T2I.split(), "global", "6", "3", "100.0", "100.0", "100.0", "33.33"] in rows
    assert ["Flickr30k", *I2T.split(), "global", "3", "6", "100.0", "100.0", "100.0", "33.33"] in rows
    assert ["mean", "replace", "global", "9", "100.0", "50.0"] in rows
    # three images are not the published set: no published score beside them, and a note
    assert "OpenCLIP" not in out
    assert "Note: Flickr30k has 3 images and 6 captions here" in out
    assert any(note.startswith("SugarCrepe has other pairs") for note in found["notes"])


def test_known_confusion_gives_the_known_scores(tmp_path: Path, images: dict[str, str]) -> None:
    root = write_all(tmp_path / "sets", images)
    # texts of green name red: of three texts two find their image; red's own captions tie with those of green
    assert evaluate(root, model=ColourModel({"green": "red"})) == 0
    assert recalls(root, "Urban1k") == {
        (T2I, "global"): pytest.approx(200 / 3),
        (I2T, "global"): pytest.approx(100 / 3),
    }
    assert recalls(root, "Urban1k", "recall_at_5") == {(T2I, "global"): 100, (I2T, "global"): 100}
    # red against green ties, green against blue ties (neither is green), blue against red is right
    (sugar,) = scores(root)["choices"]
    assert {round(score["score"], 3) for score in sugar["scores"]} == {33.333}


def test_fused_and_global_have_a_row_each(
    tmp_path: Path, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_all(tmp_path / "sets", images)
    assert evaluate(root, model=FineColourModel()) == 0
    assert recalls(root, "Flickr30k") == {
        (T2I, "fused"): 100,
        (T2I, "global"): 0,
        (I2T, "fused"): 100,
        (I2T, "global"): 0,
    }
    out = capsys.readouterr().out
    for similarity, score in (("fused", "100.0"), ("global", "0.0")):
        assert any(
            line.split()[:5] == ["Flickr30k", *T2I.split(), similarity] and score in line.split()
            for line in out.splitlines()
        )
        assert any(line.split()[:3] == ["mean", "swap", similarity] for line in out.splitlines())


def test_each_item_is_encoded_once_whatever_the_rows(tmp_path: Path, images: dict[str, str]) -> None:
    (tmp_path / "run").mkdir()
    texts = {file: [f"a {n}", f"a {n}", f"all {n}"] for n, file in images.items()}
    root = write_tables(tmp_path / "own", texts)
    model = ColourModel()
    assert evaluate(root, "--batch_size", "2", model=model) == 0
    assert len(model.encoded) == len(set(model.encoded)) == 9
    assert max(model.batch_sizes) == 2
    (entry,) = scores(root)["captions"]
    assert [s["num_queries"] for s in entry["scores"]] == [9, 3]


def test_unusable_items_are_refused_or_left_out_and_counted(
    tmp_path: Path, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_all(tmp_path / "sets", images)
    (root / "urban/image/1.jpg").write_bytes(b"<html>404</html>")
    assert evaluate(root, model=ColourModel()) == 2
    assert "urban/caption/1.txt: " in capsys.readouterr().err
    assert evaluate(root, "--allow_missing", model=ColourModel(refused="green town")) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "Urban1k is not scored: nothing remains of it" in printed
    assert evaluate(root, "--allow_missing", model=ColourModel()) == 0
    assert recalls(root, "Urban1k", "num_queries_left_out") == {(T2I, "global"): 1, (I2T, "global"): 1}
    assert "1 (text to image), 1 (image to text) of Urban1k" in capsys.readouterr().out.replace("\n", " ")


def test_sets_are_kept_beside_those_of_other_layouts(
    tmp_path: Path, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmarks = write_benchmarks(tmp_path)
    run = str(benchmarks / "run")
    root = write_urban1k(tmp_path / "urban", {file: [n] for n, file in images.items()})
    assert main([run, "--mmvp", str(benchmarks / "mmvp")], load=lambda path: ColourModel()) == 0
    assert main([run, "--captions", str(root)], load=lambda path: ColourModel()) == 0
    assert main([run, "--mmeb_eval", str(benchmarks / "mmeb")], load=lambda path: ColourModel()) == 0
    found = json.loads((benchmarks / "run/scores.json").read_text())
    assert (found["mmeb"]["overall"]["score"], found["mmvp"]["average"]["score"]) == (100, 100)
    assert [entry["name"] for entry in found["captions"]] == ["Urban1k"]
    out = capsys.readouterr().out.replace("\n", " ")
    assert "from earlier runs of the same weights and settings: MMVP, Urban1k." in out


def test_examples_come_from_a_caption_set_where_there_is_no_other(
    tmp_path: Path, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_all(tmp_path / "sets", images)
    assert evaluate(root, "--show", "2", model=ColourModel({"green": "red"})) == 0
    out = capsys.readouterr().out
    assert 'COCO: "some red": truth at rank 1 of 3\n  1.  +1.000  0red' in out
    assert 'COCO: "some green": truth at rank 3 of 3' in out  # green and blue tie behind red
    assert evaluate(root, "--example", "blue", model=ColourModel()) == 0
    assert 'COCO, 3 candidates: "blue"\n  1.  +1.000  2blue' in capsys.readouterr().out


def test_one_name_twice_is_refused(
    tmp_path: Path, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_all(tmp_path / "sets", images)
    write_tables(root / "coco_again", {file: ["red"] for file in images.values()})
    assert evaluate(root, model=ColourModel()) == 2
    assert "COCO: 2 sets of this name" in capsys.readouterr().err


def real_model(folder: Path, *, num_fine: int) -> Embedder:
    prompts = PromptConfig(num_fine=num_fine, tokens_per_prompt=1)
    torch.manual_seed(0)
    model = EmbeddingModel(load_backbone(folder, dtype=torch.float32, attention="sdpa"), prompts)
    torch.nn.init.normal_(model.prompted_embedding.vectors)
    processor = ItemProcessor.from_folder(folder, prompts=prompts, limits=ProcessorConfig())
    return Embedder(model, processor, FusionConfig(beta=0.1))


def slow_fused(model: Embedder, a_MD: Tensor, b_MD: Tensor) -> float:
    """METHOD 1 for one pair, in float64."""
    beta, q, t = model.fusion.beta, a_MD.double(), b_MD.double()

    def pattern(rows: Tensor, columns: Tensor) -> Tensor:
        return beta * ((rows @ columns.T) / beta).exp().mean().log()

    parts = torch.stack([pattern(x, y) for x in (q[:1], q[1:]) for y in (t[:1], t[1:])])
    return float(beta * (parts / beta).exp().mean().log())


def test_scores_of_a_real_model_equal_slow_loops(tmp_path: Path, images: dict[str, str]) -> None:
    model = real_model(tiny_backbone(tmp_path / "tiny"), num_fine=2)
    captions = {file: [f"{word} {n}" for word in ("a", "the", "one")] for n, file in images.items()}
    (reader,) = find_caption_sets(write_tables(tmp_path / "own", captions), images_root=None, option="")
    found = reader()
    assert isinstance(found, CaptionSet)
    items_NMD, late = encode_used(functools.partial(encode_items, model, batch_size=4), found)
    assert items_NMD.shape[1:] == (3, 32)
    assert not late
    scored = {(s.direction, s.similarity): s for s in score_captions(model, found, items_NMD)}
    for name in ("fused", "global"):

        def similarity(a: int, b: int, name: str = name) -> float:
            a_MD, b_MD = items_NMD[a], items_NMD[b]
            return slow_fused(model, a_MD, b_MD) if name == "fused" else float(a_MD[0] @ b_MD[0])

        hits = [
            all(similarity(text, image) > similarity(text, o) for o in found.images if o != image)
            for text, image in found.captions
        ]
        assert scored[T2I, name].recall_at_1 == pytest.approx(100 * sum(hits) / 9)
        hits = []
        for image in found.images:
            own = {text for text, own_image in found.captions if own_image == image}
            best = max(similarity(image, text) for text in own)
            hits.append(all(best > similarity(image, text) for text in found.texts if text not in own))
        assert scored[I2T, name].recall_at_1 == pytest.approx(100 * sum(hits) / 3)
