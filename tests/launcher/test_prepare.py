from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from agff.errors import ConfigError, DataError
from data_pipeline.manifest import check_files, read_index, read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.storage import LocalFolder
from launcher.prepare import main, prepare
from tests.drawings import write_drawings


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_with_webdataset(shards: list[Path]) -> list[dict[str, Any]]:
    """All samples; webdataset leaves its files to the garbage collector, which is no fault of the shards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
        gc.collect()
    return samples


def write_subset(root: Path, rows: list[dict[str, str]], name: str = "Sub") -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / name / "original-00000-of-00001.parquet")


def row(**values: str) -> dict[str, str]:
    return {"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": "", **values}


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    return write_drawings(tmp_path / "drawings").mmeb


def test_plain_webdataset_reads_what_the_parquet_says(drawings: Path, tmp_path: Path) -> None:
    manifest = prepare(drawings, tmp_path / "out", rows_per_shard=10)
    shared = 0
    for name, source in manifest.sources.items():
        rows = pq.read_table(next((drawings / name).glob("*.parquet"))).to_pylist()
        samples = read_with_webdataset([tmp_path / "out" / name / shard.name for shard in source.shards])
        assert len(samples) == len(rows) == source.num_samples
        reader = ShardReader(LocalFolder(tmp_path / "out"), manifest)
        for number, (sample, expected) in enumerate(zip(samples, rows, strict=True)):
            record = json.loads(sample["json"])
            assert record["query"]["text"] == expected["qry"]
            assert record["target"]["text"] == expected["pos_text"]
            for role, column in (("query", "qry_image_path"), ("target", "pos_image_path")):
                image = record[role]["image"]
                assert (image is not None) == bool(expected[column])
                if image:
                    content = (drawings / expected[column]).read_bytes()
                    assert reader.read(name, number).images[role].content == content
                    assert sample.get(image, content) == content
                    shared += image not in sample
    assert shared > 3 * 24 / 2, "four rows of Shapes_VQA use one image; it is stored once in a shard"
    assert any(" " in path for path in contents(drawings)), "the drawings' file names hold spaces"


def test_shards_do_not_depend_on_the_number_of_processes(drawings: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        prepare(
            drawings,
            tmp_path / f"out{processes}",
            rows_per_shard=10,
            executor=partial(ProcessPoolExecutor, processes) if processes > 1 else None,
        )
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


KILLED = """
import os, signal, sys
from pathlib import Path
import launcher.prepare as module
written = 0
original = {function}
def killing(*arguments, **options):
    global written
    if written == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    written += 1
    return original(*arguments, **options)
{function} = killing
module.prepare(Path(sys.argv[1]), Path(sys.argv[2]), rows_per_shard=10)
"""


@pytest.mark.parametrize(
    ("function", "moment"),
    [
        ("module.write_shard", 0),
        ("module.write_shard", 5),
        ("module._write_text", 3),
        ("os.replace", 4),
        ("module.write_manifest", 0),
        ("module.shutil.rmtree", 1),
    ],
)
def test_a_killed_conversion_continues_to_the_same_bytes(drawings: Path, tmp_path: Path, function: str, moment: int) -> None:
    prepare(drawings, tmp_path / "whole", rows_per_shard=10)
    script = KILLED.format(function=function)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(drawings), str(tmp_path / "out"), str(moment)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()
    prepare(drawings, tmp_path / "out", rows_per_shard=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_every_row_is_written_or_listed_with_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "mmeb"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images/a b.png")
    Image.new("RGB", (8, 8)).save(root / "images/a.gif")
    (root / "images/text.jpg").write_text("not an image")
    with_image = {"qry": "<|image_1|>\nx"}
    write_subset(
        root,
        [
            row(**with_image, qry_image_path="images/a b.png"),
            row(**with_image, qry_image_path="images/absent.png"),
            row(**with_image, qry_image_path="images/text.jpg"),
            row(**with_image, qry_image_path="images/a.gif"),
            row(qry="no placeholder", qry_image_path="images/a b.png"),
            row(qry="<|image_1|> <|image_1|>", qry_image_path="images/a b.png"),
            row(**with_image, qry_image_path="../outside.png"),
            row(**with_image, qry_image_path="/etc/passwd"),
            row(qry="<|image_1|>\nWebQA has no image"),
            row(pos_text=""),
        ],
    )
    out = tmp_path / "out"
    manifest = prepare(root, out)
    source = manifest.sources["Sub"]
    assert (source.num_rows, source.num_samples, source.num_rejected) == (10, 2, 8)
    rejected = [json.loads(line) for line in (out / "Sub/rejected.jsonl").read_text().splitlines()]
    expected = [
        (1, "image .*absent.png is missing"),
        (2, "text.jpg: cannot read the image"),
        (3, "image format 'GIF' is none of JPEG, PNG, WEBP"),
        (4, "stands 0 times in the text of an image, it must stand once"),
        (5, "stands 2 times in the text of an image"),
        (6, "image path '../outside.png' leaves the MMEB folder"),
        (7, "image path '/etc/passwd' leaves the MMEB folder"),
        (9, "pos: neither text nor image"),
    ]
    for entry, (number, reason) in zip(rejected, expected, strict=True):
        assert entry["row"] == number
        assert re.search(reason, entry["reason"])
    samples = read_with_webdataset([out / "Sub/Sub-00000.tar"])
    assert json.loads(samples[1]["json"])["query"]["text"] == "WebQA has no image"


def test_equal_content_has_equal_ids_and_negatives_are_carried(tmp_path: Path) -> None:
    root = tmp_path / "mmeb"
    (root / "images").mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (8, 8), color).save(root / f"images/{name}.png")
    query = {"qry": "<|image_1|>\nx", "neg_text": "n", "neg_image_path": ""}
    write_subset(root, [row(**query, qry_image_path=f"images/{name}.png") for name in "abc"])
    prepare(root, tmp_path / "out")
    samples = read_with_webdataset([tmp_path / "out/Sub/Sub-00000.tar"])
    records = [json.loads(sample["json"]) for sample in samples]
    assert records[0]["query"]["id"] == records[1]["query"]["id"] != records[2]["query"]["id"]
    assert records[0]["negative"]["text"] == "n"
    assert all(0 <= record["target"]["id"] < 2**63 for record in records)


def test_index_points_at_every_sample(drawings: Path, tmp_path: Path) -> None:
    manifest = prepare(drawings, tmp_path / "out", rows_per_shard=7)
    for name, source in manifest.sources.items():
        index = read_index(LocalFolder(tmp_path / "out"), name, source)
        assert len(index) == source.num_samples
        for shard, offset, size in zip(*(index.column(c).to_pylist() for c in ("shard", "offset", "size")), strict=True):
            content = (tmp_path / "out" / name / source.shards[shard].name).read_bytes()[offset : offset + size]
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                names = tar.getnames()
            assert len({member.partition(".")[0] for member in names}) == 1


@pytest.mark.parametrize("hashes", [True, False])
def test_missing_and_changed_shards_are_found_once(drawings: Path, tmp_path: Path, hashes: bool) -> None:
    out = tmp_path / "out"
    manifest = prepare(drawings, out, rows_per_shard=10)
    assert check_files(LocalFolder(out), manifest, part=0, num_parts=1, hashes=True) == []
    shards = sorted(out.glob("*/*.tar"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    content = bytearray(shards[2].read_bytes())
    content[600] ^= 1
    shards[2].write_bytes(content)
    found = [p for part in range(3) for p in check_files(LocalFolder(out), manifest, part=part, num_parts=3, hashes=hashes)]
    expected = [(shards[0], "shard is missing; restore it"), (shards[1], "bytes, the manifest says")]
    if hashes:
        expected.append((shards[2], "SHA-256 of the shard is"))
    assert len(found) == len(expected)
    for path, message in expected:
        assert any(problem.startswith(f"{path}: ") and message in problem for problem in found)


def test_wrong_input_is_refused_before_anything_is_written(drawings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"no <SUBSET>/original-\*.parquet here"):
        prepare(tmp_path / "nowhere", out)
    with pytest.raises(DataError, match="no subset Absent; there are Shapes_"):
        prepare(drawings, out, subsets=["Absent"])
    root = tmp_path / "mmeb"
    write_subset(root, [{"qry": "a"}])
    with pytest.raises(DataError, match="columns qry_image_path, pos_text, pos_image_path are missing"):
        prepare(root, out)
    (root / "Sub/original-00000-of-00001.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot read the parquet file"):
        prepare(root, out)
    assert not out.exists()
    prepare(drawings, out, rows_per_shard=10)
    before = contents(out)
    with pytest.raises(ConfigError, match="holds a conversion with other rows_per_shard"):
        prepare(drawings, out, rows_per_shard=11)
    with pytest.raises(ConfigError, match=r"exists and holds no conversion \(prepare.json is missing\)"):
        prepare(drawings, drawings, rows_per_shard=11)
    assert contents(out) == before


def test_damaged_and_absent_manifests_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards here"):
        read_manifest(LocalFolder(tmp_path))
    for text, message in (("{", "damaged manifest"), ('{"format": 9}', "format 9 is not 2"), ("[]", "damaged manifest")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=message):
            read_manifest(LocalFolder(tmp_path))


def test_command_line(drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--mmeb", str(drawings), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    assert "Shapes_t2i" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--max_rows", "5", "--subsets", "Shapes_t2i"]) == 0
    assert "Shapes_t2i                           5         5         0" in capsys.readouterr().out
    assert main([*arguments, "--rows_per_shard", "0"]) == 2
    assert capsys.readouterr().err == "error: --rows_per_shard 0 must be >= 1\n"
    assert main(["--mmeb", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
