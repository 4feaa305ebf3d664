"""The command that writes a teacher's vectors: on any number of ranks, after any kill, the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import agff
from agff.batch import Item
from agff.release_writer import save_release
from data_pipeline import vectors_writer
from data_pipeline.convert import prepare
from data_pipeline.decode import decode
from data_pipeline.manifest import read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from data_pipeline.vectors import open_vectors
from launcher.embed import embed_on_this_rank, main, parser
from launcher.embedding import blocks
from launcher.embedding.sentence_model import SentenceModel
from tests.agff.test_release import embedder
from tests.drawings import tiny_backbone, write_drawings
from tests.launcher.embedding.sentence_folders import write_sentence_model
from tests.launcher.own_rank import outcome_on_this_rank
from tests.launcher.runs import run_command
from tests.ranks import run_ranks

TEXTS = "Shapes_text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards, teacher (texts alone), release."""
    root = tmp_path_factory.mktemp("embed")
    prepare(write_drawings(root / "data").mmeb, root / "shards", rows_per_shard=10)
    write_sentence_model(root / "teacher")
    save_release(embedder(tiny_backbone(root / "backbone")), root / "release", origin={})
    return root


def bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def embed_in_small_blocks(argv: list[str], fail_after: int | None = None) -> str | None:
    """Blocks of 7 samples, decoded 3 at a time; the error, if there is one. fail_after: calls of the teacher
    on the last rank."""
    return outcome_on_this_rank(
        embed_on_this_rank,
        parser().parse_args(argv),
        {(vectors_writer, "BLOCK"): 7, (blocks, "GROUP"): 3},
        works=(SentenceModel, "encode"),
        fail_after=fail_after,
    )


def embed_all(folder: Path, out: Path) -> list[str | None]:
    """Of texts, killed and continued; of everything with the release."""
    texts = [str(folder / "teacher"), str(folder / "shards"), str(out / "texts"), "--sources", TEXTS]
    everything = [str(folder / "release"), str(folder / "shards"), str(out / "all"), "--batch_size", "2"]
    return [
        embed_in_small_blocks(texts, fail_after=2),
        embed_in_small_blocks(texts),
        embed_in_small_blocks(everything),
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_depend_neither_on_ranks_nor_on_kills(
    folder: Path, tmp_path: Path, world_size: int
) -> None:
    torch.set_num_threads(1)
    run_ranks_out, alone = tmp_path / "ranks", tmp_path / "alone"
    found = run_ranks(embed_all, folder, run_ranks_out, world_size=world_size)
    assert [errors[1:] for errors in found] == [[None, None]] * world_size
    assert all("no space left on device" in str(errors[0]) for errors in found)
    texts = [str(folder / "teacher"), str(folder / "shards"), str(alone / "texts"), "--sources", TEXTS]
    assert embed_in_small_blocks(texts) is None
    everything = [str(folder / "release"), str(folder / "shards"), str(alone / "all"), "--batch_size", "2"]
    assert embed_in_small_blocks(everything) is None
    for name in ("texts", "all"):
        assert bytes_of(run_ranks_out / name) == bytes_of(alone / name)
        assert len(bytes_of(alone / name)) == {"texts": 2, "all": 5}[name]


def test_a_kill_leaves_the_blocks_that_are_done(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [str(folder / "teacher"), str(folder / "shards"), str(out), "--sources", TEXTS]
    error = embed_in_small_blocks(argv, fail_after=4)  # one to learn E, three of the first block
    assert "no space left on device" in str(error)
    done = {path.name: path.stat().st_mtime_ns for path in (out / ".blocks").glob("Shapes*")}
    assert list(done) == [f"{TEXTS}-000000000"]
    assert embed_in_small_blocks(argv) is None
    assert sorted(path.name for path in out.iterdir()) == [f"{TEXTS}.npy", "vectors.json"]


def samples_of(folder: Path, source: str) -> list[tuple[Item, Item]]:
    shards = LocalFolder(folder / "shards")
    manifest = read_manifest(shards)
    reader = ShardReader(shards, manifest)
    examples = [decode(reader.read(source, n)) for n in range(manifest.sources[source].num_samples)]
    return [(example.query, example.target) for example in examples]


def test_each_side_has_its_own_vector(folder: Path, tmp_path: Path) -> None:
    argv = [str(folder / "teacher"), str(folder / "shards"), str(tmp_path), "--sources", TEXTS]
    assert main(argv) == 0
    model = SentenceModel(folder / "teacher", torch.device("cpu"))
    vectors = open_vectors(tmp_path, read_manifest(LocalFolder(folder / "shards")), sources=[TEXTS])
    for sample, sides in enumerate(samples_of(folder, TEXTS)):
        expected = model.encode(sides, batch_size=1)
        np.testing.assert_allclose(vectors.read(TEXTS, sample), expected, atol=2e-3)  # float16


def test_a_release_of_ours_embeds_images_too(folder: Path, tmp_path: Path) -> None:
    assert main([str(folder / "release"), str(folder / "shards"), str(tmp_path)]) == 0
    manifest = read_manifest(LocalFolder(folder / "shards"))
    vectors, model = open_vectors(tmp_path, manifest, sources=manifest.sources), agff.load(folder / "release")
    for source in ("Shapes_t2i", "Shapes_VQA"):
        sides = samples_of(folder, source)[5]
        expected = model.encode(list(sides))[:, 0]
        np.testing.assert_allclose(vectors.read(source, 5), expected, atol=2e-3)


def test_an_image_before_a_teacher_of_texts_is_refused_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder / "teacher"), str(folder / "shards"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert (
        "of source Shapes_VQA has an image, and the teacher embeds texts alone; name the sources" in message
    )
    assert not (tmp_path / "out").exists()


def test_a_sample_that_cannot_be_used_has_zeros_and_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture of 4 pixels' height is too thin for the backbone."""
    mmeb = write_drawings(tmp_path / "data").mmeb
    images = sorted((mmeb / "images/Shapes_i2t/Train").iterdir())
    Image.new("RGB", (2000, 4)).save(images[0])
    prepare(mmeb, tmp_path / "shards")
    out = tmp_path / "out"
    argv = [str(folder / "release"), str(tmp_path / "shards"), str(out), "--sources", "Shapes_i2t"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "1 samples or sides cannot be used, and have zeros" in said
    assert "query: the backbone's image processor refuses the image" in said
    norms = np.linalg.norm(np.load(out / "Shapes_i2t.npy").astype(np.float32), axis=2)
    assert (norms == 0).sum() == 1
    assert np.allclose(norms[norms > 0], 1, atol=1e-2)


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(folder / "teacher"), str(folder / "shards"), str(tmp_path / "v"), "--sources", TEXTS]
    assert main([*argv, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("bert, files sha256", "texts alone", "E = 8; query and target", f"{TEXTS}  24 samples"):
        assert part in said
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "nowhere: no such folder; name a release (agff_config.json), a run (config"),
        ({"model": "shards"}, "shards: no teacher here; name a release"),
        ({"shards": "teacher"}, "name the table itself, or a folder of images alone, or of shards (with man"),
        ({"shards": "nowhere"}, "nowhere: no such file or folder"),
        ({"more": ["--num_workers", "-1"]}, "--num_workers -1 must be >= 0"),
        ({"more": ["--sources", "Emoji", TEXTS]}, "--sources Emoji: the shards have no such source; they"),
        ({"more": ["--batch_size", "0"]}, "--batch_size 0 must be >= 1"),
    ],
)
def test_a_wrong_command_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    values = {"model": "teacher", "shards": "shards", "more": []} | change
    argv = [str(folder / values["model"]), str(folder / values["shards"]), str(tmp_path / "v")]
    assert main([*argv, *values["more"]]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "v").exists()


def test_vectors_of_another_teacher_are_not_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v"
    assert main([str(folder / "teacher"), str(folder / "shards"), str(out), "--sources", TEXTS]) == 0
    before = bytes_of(out)
    other = shutil.copytree(folder / "teacher", tmp_path / "other")
    values = json.loads((other / "sentence_bert_config.json").read_text()) | {"max_seq_length": 6}
    (other / "sentence_bert_config.json").write_text(json.dumps(values))
    assert main([str(other), str(folder / "shards"), str(out), "--sources", TEXTS]) == 2
    assert "holds vectors with other model; remove it" in capsys.readouterr().err
    assert bytes_of(out) == before


@pytest.mark.timeout(300)
def test_ranks_of_a_launcher_meet(project: Path, folder: Path, tmp_path: Path) -> None:
    argv = f"{folder}/teacher {folder}/shards {tmp_path}/v --sources {TEXTS}"
    result = run_command(f"torchrun --nproc-per-node 2 launcher/embed.py {argv}", project)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("written: ") == 1
    assert (tmp_path / "v" / f"{TEXTS}.npy").exists()


@pytest.mark.parametrize("teacher", ["teacher", "release"])
def test_texts_that_are_too_long_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: str
) -> None:
    """Of 24 samples the queries of a few have more than `most` tokens."""
    model = shutil.copytree(folder / teacher, tmp_path / "model")
    if teacher == "teacher":
        most = 10
        values = json.loads((model / "sentence_bert_config.json").read_text()) | {"max_seq_length": most}
        (model / "sentence_bert_config.json").write_text(json.dumps(values))
        lengths = SentenceModel(model, torch.device("cpu"))._tokenizer
        count = sum(
            len(lengths(item.text.strip()).input_ids) > most
            for sides in samples_of(folder, TEXTS)
            for item in sides
        )
    else:
        most = 26
        values = json.loads((model / "agff_config.json").read_text())
        values["processor"]["max_tokens"] = most
        (model / "agff_config.json").write_text(json.dumps(values))
        processor = agff.load(folder / teacher).processor
        count = sum(processor.num_tokens(x) > most for sides in samples_of(folder, TEXTS) for x in sides)
    argv = [str(model), str(folder / "shards"), str(tmp_path / "v"), "--sources", TEXTS]
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("agff.release.check_golden", lambda *_, **__: None)  # images need more tokens
        assert main(argv) == 0
    assert 0 < count < 48
    assert f"{count} sides have a text whose end the model does not read" in capsys.readouterr().out


def test_vectors_of_another_batch_size_are_not_continued(folder: Path, tmp_path: Path) -> None:
    argv = [str(folder / "teacher"), str(folder / "shards"), str(tmp_path / "v"), "--sources", TEXTS]
    assert "no space left" in str(embed_in_small_blocks(argv, fail_after=4))
    assert "other batch_size; remove it" in str(embed_in_small_blocks([*argv, "--batch_size", "31"]))
