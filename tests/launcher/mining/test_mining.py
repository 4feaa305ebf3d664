"""From a release to negatives in shards: what is mined, that it trains, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import agff
from agff.contract import CONTRACT_FILE
from agff.release_writer import save_release
from data_pipeline.convert import prepare
from data_pipeline.decode import decode
from data_pipeline.layouts.mmeb_train import read_pairs
from data_pipeline.manifest import read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from launcher.embedding import vectors_folder_writer
from launcher.mine import main, mine_on_this_rank, parser
from launcher.mining import subsets
from tests.agff.test_release import embedder
from tests.drawings import tiny_backbone, write_drawings
from tests.launcher.own_rank import outcome_on_this_rank
from tests.launcher.runs import run_command
from tests.mmeb import contents, row, write_subset
from tests.ranks import run_ranks

TABLE = "original-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mmeb: drawings, and Twins, whose rows hold one answer under two names and others that cannot be
    used."""
    root = tmp_path_factory.mktemp("mining")
    mmeb = write_drawings(root / "data", num_images=8).mmeb
    images = sorted((mmeb / "images/Shapes_t2i/Train").iterdir())
    place = mmeb / "images/Twins/Train"
    place.mkdir(parents=True)
    for name, source in (("a.png", 0), ("a again.png", 0), ("b.png", 1), ("c.png", 2)):
        shutil.copy(images[source], place / name)
    (place / "damaged.png").write_bytes(b"no image")
    targets = ("a.png", "a again.png", "b.png", "c.png", "damaged.png", "gone.png")
    rows: list[dict[str, Any]] = [
        row(qry=f"find {name}", pos_text="", pos_image_path=f"images/Twins/Train/{name}") for name in targets
    ]
    rows[3]["qry"] = "find b.png"  # two answers of one query
    rows += [row(qry="", pos_text="p"), row(qry="q", pos_text=" "), row(qry="find d", pos_text="find a.png")]
    for each in rows:
        each |= {"neg_text": "of before", "neg_image_path": ""}
    write_subset(mmeb, rows, "Twins")
    save_release(embedder(tiny_backbone(root / "backbone")), root / "release", origin={})
    return root


def argv_of(folder: Path, out: Path, *more: str) -> list[str]:
    argv = [str(folder / "release"), str(folder / "data/mmeb"), str(out), "--num_workers", "0"]
    return [*argv, "--batch_size", "2", *more]


def mine_in_small_blocks(argv: list[str], fail_after: int | None = None) -> str | None:
    """Blocks of 3 rows and of 3 items; the error, if there is one. fail_after: blocks of rows of the last
    rank."""
    return outcome_on_this_rank(
        mine_on_this_rank,
        parser().parse_args(argv),
        {(subsets, "QUERIES"): 3, (vectors_folder_writer, "BLOCK"): 3},
        works=(subsets, "choose"),
        fail_after=fail_after,
    )


def mine_twice(argv: list[str]) -> list[str | None]:
    return [mine_in_small_blocks(argv, fail_after=1), mine_in_small_blocks(argv)]


@pytest.mark.timeout(300)
def test_the_bytes_depend_neither_on_ranks_nor_on_kills(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    more = (
        "--num_negatives",
        "2",
        "--skip_ranks",
        "1",
        "--margin",
        "none",
        "--subsets",
        "Shapes_t2i",
        "Twins",
    )
    found = run_ranks(mine_twice, argv_of(folder, tmp_path / "ranks", *more), world_size=2)
    assert [str(errors[0]).endswith("no space left on device") for errors in found] == [True, True]
    assert [errors[1] for errors in found] == [None, None]
    assert mine_in_small_blocks(argv_of(folder, tmp_path / "alone", *more)) is None
    files = contents(tmp_path / "alone")
    assert contents(tmp_path / "ranks") == files
    tables = [f"{name}/{TABLE}" for name in ("Shapes_t2i", "Twins")]
    assert [name for name in files if not name.startswith("images")] == [*tables, "mining.json"]
    assert [path.is_symlink() for path in (tmp_path / "alone").iterdir() if path.name == "images"] == [True]


def test_the_negatives_are_the_most_similar_of_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shapes_t2i: eight pictures, an answer each, so all seven others are negatives in their order."""
    more = ("--subsets", "Shapes_t2i", "--num_negatives", "7", "--margin", "none")
    assert main(argv_of(folder, tmp_path / "out", *more)) == 0
    assert "Shapes_t2i                         8          56           0" in capsys.readouterr().out
    mmeb = folder / "data/mmeb"
    pairs = list(read_pairs(mmeb, "Shapes_t2i", split="original", start=0, stop=8))
    model = agff.load(folder / "release")
    sides = [(pair.query.text, pair.target.image) for pair in pairs if not isinstance(pair, str)]
    queries, targets = (model.encode([side[place] for side in sides]) for place in (0, 1))
    similarity = model.similarity(queries, targets)
    table = pq.read_table(tmp_path / "out/Shapes_t2i" / TABLE).to_pylist()
    for number, found in enumerate(table):
        order = [i for i in similarity[number].argsort(descending=True).tolist() if i != number]
        assert found["neg_image_path"] == [table[i]["pos_image_path"] for i in order]
        assert found["neg_text"] == [table[i]["pos_text"] for i in order]
        assert found["pos_similarity"] == pytest.approx(similarity[number, number].item(), abs=1e-6)
        assert found["neg_similarity"] == pytest.approx(similarity[number, order].tolist(), abs=1e-6)


def test_an_answer_of_the_query_is_no_negative_whatever_its_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--subsets", "Twins", "--num_negatives", "4", "--margin", "none")
    assert main(argv) == 0
    rows = pq.read_table(out / "Twins" / TABLE).to_pylist()
    shown = [
        {Path(path).name or text for path, text in zip(r["neg_image_path"], r["neg_text"], strict=True)}
        for r in rows
    ]
    a, b, c, text = "a.png", "b.png", "c.png", "find a.png"
    # row 0's query is the text that is the target of row 8
    assert shown == [{b, c}, {b, c, text}, {a, text}, {a, text}, set(), set(), set(), set(), {a, b, c}]
    assert all("of before" not in row["neg_text"] for row in rows)
    report = json.loads((out / "mining.json").read_text())["report"]["Twins"]
    assert report == {
        "rows": 9,
        "unusable": 4,
        "short": 5,
        "without": 0,
        "negatives": 12,
        "dropped": {"content": 3, "skip_ranks": 0, "margin": 0, "max_rank": 0},
    }
    said = capsys.readouterr().out
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-6:] == said.splitlines()[-6:], "all is there already"


def test_tables_that_differ_and_paths_that_name_no_image_are_written_as_they_are(
    folder: Path, tmp_path: Path
) -> None:
    """Parts of one subset may store texts in other ways; whatever a path names, the tables come out."""
    mmeb, out = tmp_path / "mmeb", tmp_path / "out"
    image = next((folder / "data/mmeb/images/Shapes_t2i/Train").iterdir())
    for name in ("Sub", "Other"):
        write_subset(mmeb, [row(qry=f"q{i}", pos_text=f"p{i}") for i in range(3)], name)
        shutil.copy(image, mmeb / name / "a.png")
    (mmeb / "mining.json").write_text("of before")
    first, second = (mmeb / f"Sub/original-0000{i}-of-00002.parquet" for i in range(2))
    (mmeb / "Sub" / TABLE).rename(first)
    paths = ["Other/a.png", "Sub/a.png", "Sub", f"Sub/{first.name}", "mining.json", ".blocks", "writing.lock"]
    rows = [
        row(qry=f"r{i}", pos_text="", pos_image_path=path, pos_inst="Say.") for i, path in enumerate(paths)
    ]
    columns = {name: pa.array([each[name] for each in rows], type=pa.large_string()) for name in rows[0]}
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": "{}"}), second)
    argv = [str(folder / "release"), str(mmeb), str(out), "--num_workers", "0", "--subsets", "Sub"]
    assert main([*argv, "--margin", "none", "--num_negatives", "3"]) == 0
    tables = [pq.read_table(out / "Sub" / path.name) for path in (first, second)]
    assert [table.num_rows for table in tables] == [3, 7]
    assert [len(cells) for table in tables for cells in table["neg_text"].to_pylist()] == [3] * 5 + [0] * 5
    assert tables[1].schema.metadata is None, "it described other columns"
    assert sorted(path.name for path in out.iterdir()) == ["Other", "Sub", "mining.json"]
    assert [path.name for path in (out / "Other").iterdir()] == ["a.png"], "its tables were not mined"
    assert "report" in json.loads((out / "mining.json").read_text())
    assert (mmeb / "mining.json").read_text() == "of before"
    assert prepare(out, tmp_path / "shards").sources.keys() == {"Sub"}


def mined_shards(folder: Path, root: Path) -> Path:
    """Two negatives a row, prepared."""
    out, shards = root / "mined", root / "mined_shards"
    more = ("--subsets", "Shapes_t2i", "--num_negatives", "2", "--margin", "0.5")
    assert main(argv_of(folder, out, *more)) == 0
    prepare(out, shards)
    return shards


def test_what_is_mined_is_prepared(folder: Path, tmp_path: Path) -> None:
    shards = LocalFolder(mined_shards(folder, tmp_path))
    manifest = read_manifest(shards)
    assert manifest.sources["Shapes_t2i"].num_samples == 8
    assert manifest.sources["Shapes_t2i"].most_negatives == 2
    reader = ShardReader(shards, manifest)
    table = pq.read_table(tmp_path / "mined/Shapes_t2i" / TABLE).to_pylist()
    for number, expected in enumerate(table):
        example = decode(reader.read("Shapes_t2i", number))
        assert [item.text for item in example.negatives] == expected["neg_text"]
        assert all(item.image is not None for item in example.negatives)


@pytest.mark.slow
def test_what_is_mined_is_trained_on(folder: Path, project: Path) -> None:
    """A step of 8 pairs has 7 other targets a row at most; two more negatives of each make up to 23."""
    mined_shards(folder, project)
    command = "python launcher/train.py --run_dir runs/mined --data.shards mined_shards --num_steps 1"
    result = run_command(f"{command} --optimizer.warmup_steps 0 --log_every 1", project)
    assert result.returncode == 0, result.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(project / "runs/mined/tensorboard")).Reload()
    (negatives,) = events.Scalars("train/negatives_per_row")
    assert 7 < negatives.value <= 23


def without_column(folder: Path) -> None:
    table = pq.read_table(folder / "mmeb/Sub" / TABLE)
    pq.write_table(table.drop_columns(["pos_text"]), folder / "mmeb/Sub" / TABLE)


def newer(folder: Path) -> None:
    path = folder / "release" / CONTRACT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def other_output(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("mine")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (without_column, [], "missing columns pos_text; found qry, qry_image_path"),
        (newer, [], "format 99 is newer than"),
        (
            other_output,
            [],
            "out exists and holds nothing that was mined (mining.json is missing), but thesis",
        ),
        (nothing, ["--num_negatives", "3"], "Sub: 3 different targets, so at most 2 negatives a query"),
        (nothing, ["--num_negatives", "1", "--skip_ranks", "2"], "Sub: 3 different targets, so at most 2"),
        (nothing, ["--num_negatives", "0"], "--num_negatives 0 must be >= 1"),
        (nothing, ["--subsets", "Other"], "no subset Other; there are Sub"),
        (nothing, ["--margin", "-2"], "no row has a negative by these rules; raise --margin"),
        (nothing, ["--batch_size", "0"], "--batch_size 0 must be >= 1"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_half_written(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    more: list[str],
    message: str,
) -> None:
    shutil.copytree(folder / "release", tmp_path / "release")
    write_subset(tmp_path / "mmeb", [row(qry=f"q{i}", pos_text=f"p{i % 3}") for i in range(4)])
    change(tmp_path)
    argv = [str(tmp_path / "release"), str(tmp_path / "mmeb"), str(tmp_path / "out"), "--num_workers", "0"]
    assert main([*argv, *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/*.parquet"))
    assert not (tmp_path / "out/mining.json").exists()


def test_mining_by_other_rules_is_not_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = argv_of(folder, tmp_path / "out", "--subsets", "Shapes_text")
    assert "no space left" in str(mine_in_small_blocks(argv, fail_after=1))
    assert main([*argv, "--num_negatives", "2"]) == 2
    assert "out holds negatives with other rules; remove it, or choose another" in capsys.readouterr().err
    assert mine_in_small_blocks(argv) is None
