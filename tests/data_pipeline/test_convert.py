from __future__ import annotations

import errno
import gc
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from agff.errors import ConfigError, DataError
from data_pipeline import claim, convert
from data_pipeline.convert import prepare
from data_pipeline.decode import decode
from data_pipeline.manifest import read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.regions import content_id
from data_pipeline.storage import LocalFolder
from data_pipeline.verify import check_folder
from tests.mmeb import contents, row, write_subset


def read_with_webdataset(shards: list[Path]) -> list[dict[str, Any]]:
    """All samples; webdataset leaves its files to the garbage collector, which is no fault of the shards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
        gc.collect()
    return samples


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


def test_shards_are_byte_for_byte_what_webdataset_writes(drawings: Path, tmp_path: Path) -> None:
    prepare(drawings, tmp_path / "out", rows_per_shard=10)
    shards = sorted((tmp_path / "out").glob("*/*.tar"))
    for shard in shards:
        written = io.BytesIO()
        options = {"encoder": False, "user": "", "group": "", "mode": 0o644, "mtime": 0}
        with tarfile.open(shard) as tar, webdataset.TarWriter(written, **options) as writer:
            for member in tar:
                key, _, name = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                writer.write({"__key__": key, name: content.read()})
        assert shard.read_bytes() == written.getvalue()
    assert len(shards) > 4


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
import data_pipeline.convert as module
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
        ("module.write_text", 3),
        ("os.replace", 4),
        ("module.write_manifest", 0),
        ("module.shutil.rmtree", 1),
    ],
)
def test_a_killed_conversion_continues_to_the_same_bytes(
    drawings: Path, tmp_path: Path, function: str, moment: int
) -> None:
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


def test_a_file_system_that_fails_for_a_while_costs_no_row(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(drawings, tmp_path / "whole")
    right, reads = Path.read_bytes, itertools.count()

    def fails_once(path: Path) -> bytes:
        if path.suffix == ".png" and next(reads) == 7:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return right(path)

    monkeypatch.setattr(Path, "read_bytes", fails_once)
    with pytest.raises(
        DataError, match=r"cannot read or write .*\.png: Stale file handle; free space or fix the cause"
    ):
        prepare(drawings, tmp_path / "out")
    assert prepare(drawings, tmp_path / "out") == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


LONG_TEXTS = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
texts = [f"{number} " + "word " * 800 for number in range(150_000)]
none = [""] * len(texts)
table = pa.table({"qry": texts, "qry_image_path": none, "pos_text": texts, "pos_image_path": none})
assert table.nbytes > 2**30
pq.write_table(table, sys.argv[1], row_group_size=len(texts))
"""


MEASURED = """
import contextlib, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
import psutil
from data_pipeline import claim, convert
from data_pipeline.convert import prepare

def watch():
    global largest
    own = psutil.Process()
    while True:
        with contextlib.suppress(psutil.Error):
            family = [own, *own.children(recursive=True)]
            # pages that processes share count once
            largest = max(largest, sum(process.memory_full_info().pss for process in family))
        time.sleep(0.03)

largest = 0
threading.Thread(target=watch, daemon=True).start()
prepare(Path(sys.argv[1]), Path(sys.argv[2]), rows_per_shard=10_000, executor=partial(ProcessPoolExecutor, 2))
print(largest)
"""


def test_memory_stays_below_one_gibibyte_for_a_large_subset(tmp_path: Path) -> None:
    """1.2 GB of text in one row group, as a careless writer leaves it."""
    root = tmp_path / "mmeb"
    (root / "Long").mkdir(parents=True)
    # in processes of their own: a process begins with the peak of the one that started it
    subprocess.run(
        [sys.executable, "-c", LONG_TEXTS, str(root / "Long/original-00000-of-00001.parquet")], check=True
    )
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(root), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert 2**27 < int(result.stdout) < 2**30


def test_two_conversions_into_one_folder_take_turns(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(drawings, tmp_path / "whole", rows_per_shard=10)
    right, other_waits, shards = convert.write_shard, threading.Event(), itertools.count()

    def once_the_other_waits(*arguments: Any, **options: Any) -> Any:
        next(shards)
        assert other_waits.wait(60)
        return right(*arguments, **options)

    monkeypatch.setattr(convert, "write_shard", once_the_other_waits)
    monkeypatch.setattr(claim.log, "warning", lambda *_: other_waits.set())
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(prepare, drawings, tmp_path / "out", rows_per_shard=10) for _ in range(2)]
        assert both[0].result() == both[1].result()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert next(shards) == len(list((tmp_path / "out").glob("*/*.tar"))), "each shard was written once"


def test_instructions_kept_apart_by_the_source_stay_apart(tmp_path: Path) -> None:
    root = tmp_path / "mmeb"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images/a.png")
    rows = [
        row(qry="a dog", qry_inst="Find it:", pos_text="", pos_inst="<|image_1|> Represent the given image.")
        | {"pos_image_path": "images/a.png"},
        row(
            qry="",
            qry_inst="<|image_1|> What is it?",
            qry_image_path="images/a.png",
            pos_inst="",
            pos_text="A dog.",
        ),
        row(qry_inst="", pos_text="", pos_image_path="images/a.png", pos_inst=""),
    ]
    write_subset(root, rows)
    manifest = prepare(root, tmp_path / "out")
    reader = ShardReader(LocalFolder(tmp_path / "out"), manifest)
    first, second = (reader.read("Sub", number).record for number in range(2))
    assert first["query"] == {
        "text": "Find it: a dog\n",
        "instruction": "Find it:",
        "image": None,
        "id": first["query"]["id"],
    }
    assert first["target"]["text"] == "<|image_1|>\nRepresent the given image.\n"
    assert second["query"]["text"] == "<|image_1|>\nWhat is it?\n"
    assert (second["query"]["instruction"], second["target"]["text"]) == ("What is it?", "A dog.")
    assert "instruction" not in second["target"]
    examples = [decode(reader.read("Sub", number)) for number in range(3)]
    found = [[item.instruction for item in example.items] for example in examples]
    alone = "Represent the given image."
    assert found == [["Find it:", alone], ["What is it?", ""], ["", alone]]
    assert examples[2].target.text == f"<|image_1|>\n{alone}\n", "an image without a text gets the rule's"


def test_the_other_split_has_its_own_parquet(tmp_path: Path) -> None:
    root = tmp_path / "mmeb"
    write_subset(root, [row(qry="plain")])
    pq.write_table(
        pa.Table.from_pylist([row(qry="diverse")]), root / "Sub/diverse_instruction-00000-of-00001.parquet"
    )
    for split, text in (("original", "plain"), ("diverse_instruction", "diverse")):
        manifest = prepare(root, tmp_path / split, split=split)
        reader = ShardReader(LocalFolder(tmp_path / split), manifest)
        assert manifest.sources["Sub"].num_rows == 1
        assert reader.read("Sub", 0).record["query"]["text"] == text


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
        (1, "image .*absent.png: is missing"),
        (2, r"text.jpg: is text \('not an image'\), not one of JPEG, PNG, WEBP"),
        (3, "a.gif: is GIF, not one of JPEG, PNG, WEBP"),
        (4, "appears 0 times in text 'no placeholder'; beside an image it must appear once"),
        (5, "appears 2 times in text"),
        (6, "image path '../outside.png' leaves the folder of the images"),
        (7, "image path '/etc/passwd' leaves the folder of the images"),
        (9, "pos: neither text nor image"),
    ]
    for entry, (number, reason) in zip(rejected, expected, strict=True):
        assert entry["row"] == number
        assert re.search(reason, entry["reason"])
    samples = read_with_webdataset([out / "Sub/Sub-00000.tar"])
    assert json.loads(samples[1]["json"])["query"]["text"] == "WebQA has no image"


def test_images_that_pillow_trips_over_are_rejected_and_the_rest_written(tmp_path: Path) -> None:
    root = tmp_path / "mmeb"
    (root / "images").mkdir(parents=True)
    texts = PngInfo()
    texts.add_text("comment", "x" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(root / "images/long.png", pnginfo=texts)
    Image.new("RGB", (8, 8)).save(root / "images/a.eps")
    with_image = {"qry": "<|image_1|>\nx"}
    names = ["images/long.png", "images/nul\0.png", "images/a.eps"]
    write_subset(root, [row(), *(row(**with_image, qry_image_path=name) for name in names)])
    manifest = prepare(root, tmp_path / "out")
    assert (manifest.sources["Sub"].num_samples, manifest.sources["Sub"].num_rejected) == (1, 3)
    reasons = [
        json.loads(line)["reason"] for line in (tmp_path / "out/Sub/rejected.jsonl").read_text().splitlines()
    ]
    assert [
        re.search(p, r) is not None
        for p, r in zip(["too large", "null byte", "is EPS, not one of"], reasons, strict=True)
    ]


def test_a_jpeg_of_several_pictures_is_kept_as_the_jpeg_it_is(tmp_path: Path) -> None:
    """Cameras write them; Pillow calls the format MPO."""
    root = tmp_path / "mmeb"
    (root / "images").mkdir(parents=True)
    red, blue = (Image.new("RGB", (56, 56), color) for color in ("red", "blue"))
    red.save(root / "images/two.jpg", "MPO", save_all=True, append_images=[blue])
    write_subset(root, [row(qry="<|image_1|>\nx", qry_image_path="images/two.jpg")])
    manifest = prepare(root, tmp_path / "out")
    raw = ShardReader(LocalFolder(tmp_path / "out"), manifest).read("Sub", 0)
    assert raw.images["query"].address == "Sub-00000.tar:000000000.query.jpg"
    image = decode(raw).query.image
    assert image is not None
    assert image.getpixel((28, 28))[0] > 250, "the first picture"


def test_a_damaged_parquet_page_is_named_as_such(tmp_path: Path) -> None:
    root = tmp_path / "mmeb"
    write_subset(root, [row(qry=f"number {n}") for n in range(500)])
    path = root / "Sub/original-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: damaged parquet file"):
        prepare(root, tmp_path / "out")


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


def test_all_negatives_of_a_row_are_in_the_shard_and_the_manifest_has_the_largest_number(
    tmp_path: Path,
) -> None:
    root, out = tmp_path / "mmeb", tmp_path / "out"
    (root / "images").mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), color).save(root / f"images/{name}.png")
    none = {"neg_text": None, "neg_image_path": None}
    lists = {"neg_text": ["x", "", "p"], "neg_image_path": ["", "images/b.png", ""]}
    write_subset(root, [row() | none, row(qry="<|image_1|>", qry_image_path="images/b.png") | lists])
    write_subset(root, [row()], "Without")
    manifest = prepare(root, out)
    assert [manifest.sources[name].most_negatives for name in ("Sub", "Without")] == [3, 0]
    assert read_manifest(LocalFolder(out)) == manifest
    assert check_folder(LocalFolder(out), manifest, deep=True, processes=1) == []
    reader = ShardReader(LocalFolder(out), manifest)
    first, second = (decode(reader.read("Sub", number)) for number in range(2))
    assert first.negatives == ()
    assert [item.text for item in second.negatives] == ["x", "<|image_1|>\nRepresent the given image.\n", "p"]
    assert second.negatives[1].image == second.query.image
    assert second.negative_ids[2] == second.target_id == content_id("p", None)
    members = [list(sample) for sample in read_with_webdataset([out / "Sub/Sub-00000.tar"])]
    assert sum(name.endswith("png") for names in members for name in names) == 1, "an image is stored once"
    shard = out / "Sub/Sub-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"text":"x"', b'"text":"y"'))
    problems = check_folder(LocalFolder(out), manifest, deep=False, processes=1)
    assert "Sub-00000.tar:000000001: text or image of the negative is not what was written" in problems


def test_shards_of_before_have_one_negative_or_none(tmp_path: Path) -> None:
    root, out = tmp_path / "mmeb", tmp_path / "out"
    write_subset(root, [row(neg_text="n")])
    manifest = prepare(root, out)
    values = json.loads((out / "manifest.json").read_text())
    del values["sources"]["Sub"]["most_negatives"]
    (out / "manifest.json").write_text(json.dumps(values))
    assert read_manifest(LocalFolder(out)) == manifest


def test_wrong_input_is_refused_before_anything_is_written(drawings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"no <SUBSET>/original-\*.parquet here"):
        prepare(tmp_path / "nowhere", out)
    with pytest.raises(DataError, match="no subset Absent; there are Shapes_"):
        prepare(drawings, out, subsets=["Absent"])
    root = tmp_path / "mmeb"
    write_subset(root, [{"qry": "a"}])
    with pytest.raises(
        DataError, match="missing columns qry_image_path, pos_text, pos_image_path; found qry"
    ):
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
