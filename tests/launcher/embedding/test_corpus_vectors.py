"""All vectors of a corpus: of any input, on any number of ranks, after any kill, the model's own vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import agff
from agff.embedder import Embedder
from agff.errors import ConfigError
from agff.release_writer import save_release
from data_pipeline.convert import prepare
from launcher.embed import embed_on_this_rank, main, parser
from launcher.embedding import vectors_folder_writer
from launcher.embedding.corpus_vectors import HowToEncode, settings_of_work
from launcher.embedding.teacher import OurModel
from launcher.embedding.vectors_folder import VectorsFolder
from tests.agff.test_release import embedder
from tests.drawings import tiny_backbone, write_drawings
from tests.launcher.own_rank import outcome_on_this_rank
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mmeb, shards, release, photos (with one damaged file and one that is no image)."""
    root = tmp_path_factory.mktemp("corpus")
    paths = write_drawings(root / "data", num_images=6)
    prepare(paths.mmeb, root / "shards")
    save_release(embedder(tiny_backbone(root / "backbone")), root / "release", origin={})
    for number, path in enumerate(sorted((paths.mmeb / "images/Shapes_t2i/Train").iterdir())):
        place = root / "photos" / ("one" if number % 2 else "two") / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((56 + 28 * (number % 3), 84)).save(place)
    (root / "photos/one/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (root / "photos/notes.md").write_text("not an image")
    (root / "photos/linked").symlink_to(root / "photos/two")
    (root / "photos/one/circle.png").symlink_to("circle.png")
    return root


TABLE: list[dict[str, Any]] = [
    {"id": "heart", "text": "a red heart"},
    {"text": None, "image": "two/{}"},
    {"id": 7, "text": "what is this?", "image": "two/{}", "price": 3},
    {"id": "long", "text": "red heart " * 700},
    {"id": "nothing", "text": " ", "image": ""},
    {"id": "out", "image": "../release/README.md"},
    {"id": "gone", "image": "two/gone.png"},
]


def write_rows(folder: Path, name: str) -> Path:
    image = min(path.name for path in (folder / "photos/two").iterdir())
    rows = [{key: str(x).format(image) if key == "image" else x for key, x in row.items()} for row in TABLE]
    path = folder / "photos" / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    columns = {key: [row.get(key) for row in rows] for key in ("text", "image")}
    columns["id"] = [None if row.get("id") is None else str(row["id"]) for row in rows]
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_table_has_the_vectors_of_the_model_itself(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_rows(folder, name)
    try:
        argv = [str(folder / "release"), str(table), str(tmp_path / "v"), "--dtype", "float32"]
        assert main([*argv, "--batch_size", "2"]) == 0
    finally:
        table.unlink()
    said = capsys.readouterr().out
    assert "4 items\n3 items cannot be used and have no vector" in said
    assert "1 items have a text whose end the model does not read" in said
    found, model = VectorsFolder(tmp_path / "v", check_hashes=True), agff.load(folder / "release")
    items = [found.item(row) for row in range(len(found))]
    assert [item.id for item in items] == ["heart", "1", "7", "long"]
    image = items[1].image
    assert image is not None
    assert found.image_file(items[1]) == folder / "photos" / image
    texts: list[Any] = [
        "a red heart",
        folder / "photos" / image,
        {"text": "what is this?", "image": folder / "photos" / image},
        "red heart " * 700,
    ]
    np.testing.assert_allclose(found.vectors, model.encode(texts).numpy(), atol=1e-6)
    found.check_model(model, name=folder / "release")
    lines = (tmp_path / "v/rejected.jsonl").read_text().splitlines()
    assert [(row["item"], row["id"]) for row in map(json.loads, lines)] == [
        (4, "nothing"), (5, "out"), (6, "gone"),
    ]  # fmt: skip
    assert "row 4: neither text nor image" in lines[0]
    assert "leaves the folder of the images" in lines[1]
    assert "gone.png: is missing" in lines[2]


@pytest.mark.parametrize("what", ["weights", "processor", "fusion"])
def test_vectors_of_another_model_are_refused(folder: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a heart"}')
    argv = [str(folder / "release"), str(tmp_path / "rows.jsonl"), str(tmp_path / "v"), "--num_workers", "0"]
    assert main(argv) == 0
    model = agff.load(folder / "release")
    if what == "weights":
        model.model.prompted_embedding.vectors.data.add_(1e-3)
    elif what == "processor":
        model.processor.limits = replace(model.processor.limits, max_tokens=99)
    else:
        model.fusion = replace(model.fusion, beta=0.1)
    with pytest.raises(ConfigError, match=rf"made by .*release, and other has other {what}; name that model"):
        VectorsFolder(tmp_path / "v").check_model(model, name=Path("other"))


def test_a_folder_of_images_names_what_it_leaves_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder / "release"), str(folder / "photos"), str(tmp_path / "v")]) == 0
    said = capsys.readouterr().out
    assert (
        "folder of images, 8 items; 1 other files there have no image's name; 1 links to folders "
        "there are not followed"
    ) in said
    assert "6 items\n2 items cannot be used" in said
    assert "damaged PNG" in (tmp_path / "v/rejected.jsonl").read_text()
    found = VectorsFolder(tmp_path / "v")
    paths = sorted(
        path.relative_to(folder / "photos").as_posix() for path in folder.glob("photos/[ot][nw][eo]/*.png")
    )
    names = [found.item(row).image for row in range(len(found))]
    assert names == [path for path in paths if "damaged" not in path and "circle" not in path]
    assert found.vectors.dtype == np.float16
    model = agff.load(folder / "release")
    expected = model.encode([folder / "photos" / str(name) for name in names])
    np.testing.assert_allclose(found.vectors, expected.numpy(), atol=5e-4)


def test_shards_and_the_tables_they_come_from_have_equal_vectors(folder: Path, tmp_path: Path) -> None:
    release, mmeb = str(folder / "release"), folder / "data/mmeb"
    table = str(mmeb / "Shapes_VQA/original-00000-of-00001.parquet")
    assert main([release, table, str(tmp_path / "table"), "--dtype", "float32"]) == 0
    argv = [release, str(folder / "shards"), str(tmp_path / "shards"), "--all_vectors"]
    assert main([*argv, "--sources", "Shapes_VQA", "--dtype", "float32", "--sides", "query"]) == 0
    of_table, of_shards = VectorsFolder(tmp_path / "table"), VectorsFolder(tmp_path / "shards")
    assert len(of_shards) == 24
    ids = [of_table.item(row).id for row in range(len(of_table))]
    assert ids[:3] == ["Shapes_VQA/0:query", "Shapes_VQA/0:target", "Shapes_VQA/1:query"]
    assert len(set(ids)) == len(ids) < 48, "equal answers are one item"
    first = of_shards.item(0)
    assert first.id == "Shapes_VQA/Shapes_VQA-00000.tar:000000000:query"
    assert first.image == "Shapes_VQA/Shapes_VQA-00000.tar:000000000.query.png"
    assert of_shards.image_file(first) is None
    np.testing.assert_allclose(of_shards.vectors[0], of_table.vectors[0], atol=1e-6)


def embed_in_small_blocks(argv: list[str], fail_after: int | None = None) -> str | None:
    """Blocks of 3 items; the error, if there is one. fail_after: forwards on the last rank."""
    return outcome_on_this_rank(
        embed_on_this_rank,
        parser().parse_args(argv),
        {(vectors_folder_writer, "BLOCK"): 3},
        works=(Embedder, "encode_inputs"),
        fail_after=fail_after,
    )


def embed_twice(argv: list[str]) -> list[str | None]:
    """Killed on rank 1 when one of its two blocks is done; continued."""
    return [embed_in_small_blocks(argv, fail_after=3), embed_in_small_blocks(argv)]


def bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.slow  # tests/launcher/mining has the same of two ranks, and the kill of one is tested below
@pytest.mark.timeout(300)
def test_the_bytes_depend_neither_on_ranks_nor_on_kills(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    table = str(folder / "data/mmeb/Shapes_i2t/original-00000-of-00001.parquet")
    argv = [str(folder / "release"), table, str(tmp_path / "ranks"), "--batch_size", "2"]
    argv += ["--num_workers", "0"]  # ranks of a test are daemons, which have no children
    found = run_ranks(embed_twice, argv, world_size=2)
    assert [str(errors[0]).endswith("no space left on device") for errors in found] == [True, True]
    assert [errors[1] for errors in found] == [None, None]
    alone = [*argv[:2], str(tmp_path / "alone"), *argv[3:5]]
    assert embed_in_small_blocks(alone) is None
    assert bytes_of(tmp_path / "ranks") == bytes_of(tmp_path / "alone")
    assert set(bytes_of(tmp_path / "alone")) == {
        "vectors.npy", "items.jsonl", "rejected.jsonl", "vectors.json",
    }  # fmt: skip
    done = bytes_of(tmp_path / "alone")
    assert embed_in_small_blocks(alone) is None, "a finished one is left as it is"
    assert bytes_of(tmp_path / "alone") == done


def test_a_kill_leaves_the_blocks_that_are_done(folder: Path, tmp_path: Path) -> None:
    argv = [str(folder / "release"), str(folder / "photos"), str(tmp_path / "v"), "--num_workers", "0"]
    assert "no space left" in str(embed_in_small_blocks(argv, fail_after=3))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "v/.blocks").glob("0*")}
    assert list(done) == ["000000000000"]
    other = embed_in_small_blocks([*argv, "--batch_size", "5"])
    assert "holds vectors with other settings; remove it, or choose another folder" in str(other)
    assert embed_in_small_blocks(argv) is None
    assert len(VectorsFolder(tmp_path / "v")) == 6


@pytest.mark.parametrize("what", ["tokenizer", "image processor"])
def test_what_makes_the_inputs_is_part_of_the_work_and_of_a_teacher(folder: Path, what: str) -> None:
    """Weights, limits and texts are the same: vectors of both would be mixed without a word."""
    model, how = agff.load(folder / "release"), HowToEncode(batch_size=2, dtype="float32", num_workers=0)
    before = settings_of_work(model, how), OurModel(model).identity
    if what == "tokenizer":
        model.processor.tokenizer.add_tokens(["heart"])
    else:
        model.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    after = settings_of_work(model, how), OurModel(model).identity
    assert all(one != other for one, other in zip(before, after, strict=True))


def empty(folder: Path) -> Path:
    (folder / "none").mkdir()
    return folder / "none"


def table_of(**columns: list[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "t.parquet")
        return folder / "t.parquet"

    return write


def written(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def beside_images(folder: Path) -> Path:
    Image.new("RGB", (28, 28)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("write", "more", "message"),
    [
        (empty, [], "none: no images here (.jpg, .jpeg"),
        (beside_images, [], "holds metadata.jsonl; name the table itself, or a folder of images alone"),
        (written("a.csv", "x"), [], "a.csv: a file must be rows as .jsonl, .json or .parquet"),
        (written("a.jsonl", ""), [], "a.jsonl: no rows"),
        (written("a.jsonl", "[1]"), [], "a.jsonl: byte 1: '1]' where an object must begin"),
        (
            written("a.jsonl", '{"x": 1}'),
            [],
            "none of the 1 items can be used, the first because of row 0: ne",
        ),
        (written("a.jsonl", '{"text": 5}'), [], "the first because of row 0: text must be a text, found 5"),
        (written("a.parquet", "no"), [], "a.parquet: not a readable parquet file"),
        (table_of(caption=["a"]), [], "t.parquet: neither a column text nor image; found caption"),
        (table_of(text=[1]), [], "row 0: column text holds 1 (int64); it must be text"),
        (table_of(text=["a"], id=[1.5]), [], "column id (double) must be texts or whole numbers"),
        (table_of(text=["a"], qry=["a"], pos_text=["a"]), [], "which are meant cannot be known"),
        (
            table_of(qry=["a"], pos_text=["a"]),
            [],
            "t.parquet: missing columns qry_image_path, pos_image_path",
        ),
        (table_of(text=["a"]), ["--sides", "query"], "--sides is not for a parquet rows, which"),
        (table_of(text=["a"]), ["--images", "nowhere"], "--images nowhere: no such folder"),
    ],
)
def test_an_input_that_cannot_be_used_is_refused_and_nothing_is_written(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], Path],
    more: list[str],
    message: str,
) -> None:
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in")
    assert main([str(folder / "release"), str(path), str(tmp_path / "v"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "v/vectors.json").exists()


def test_an_output_of_something_else_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v/thesis.txt").write_text("mine")
    photos, shards = str(folder / "photos"), str(folder / "shards")
    assert main([str(folder / "release"), photos, str(tmp_path / "v")]) == 2
    assert "exists and holds no vectors (vectors.json is missing), but thesis.txt" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["thesis.txt"]
    assert main([str(folder / "release"), shards, str(tmp_path / "w"), "--dtype", "float32"]) == 2
    assert "--dtype is not for a folder of shards without --all_vectors" in capsys.readouterr().err
    assert main([str(folder / "data"), photos, str(tmp_path / "w")]) == 2
    assert "data: no release or run of ours; name a release" in capsys.readouterr().err
