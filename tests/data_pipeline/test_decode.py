from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from agff.errors import DataError, StorageError
from data_pipeline.convert import prepare
from data_pipeline.decode import decode
from data_pipeline.manifest import Manifest, read_manifest, write_index
from data_pipeline.reader import ShardReader, parse_sample, roles_of
from data_pipeline.storage import LocalFolder
from tests.drawings import write_drawings

ADDRESS = "train-00017.tar:000123.query.jpg"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_of(record: object, **members: bytes) -> bytes:
    content = record if isinstance(record, bytes) else json.dumps(record).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, value in {"json": content, **{k.replace("_", "."): v for k, v in members.items()}}.items():
            header = tarfile.TarInfo(f"k.{name}")
            header.size = len(value)
            tar.addfile(header, io.BytesIO(value))
    return buffer.getvalue()


def no_other_bytes(offset: int, size: int) -> bytes:
    raise AssertionError("every image is in the sample")


def record(text: object = "<|image_1|>\nx", image: str | None = "query.png") -> dict:
    return {
        "query": {"text": text, "image": image, "id": 1},
        "target": {"text": "t", "image": None, "id": 2},
    }


RED = encoded(Image.new("RGB", (4, 4), "red"))


def test_a_whole_sample() -> None:
    example = decode(parse_sample(tar_of(record(), query_png=RED), "s.tar", no_other_bytes))
    assert (example.query_id, example.target_id, example.address) == (1, 2, "s.tar:k")
    assert example.query.image is not None
    assert example.query.image.getpixel((0, 0)) == (255, 0, 0)
    assert example.target.image is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of(record()), r"^s.tar:k: member or field 'query.png' is missing"),
        (tar_of({"query": {}}), r"^s.tar:k: member or field 'image' is missing"),
        (tar_of(b"\xff\xfe"), r"^s.tar:k.json: text is not UTF-8"),
        (tar_of(b"{"), r"^s.tar:k.json: not a sample's record"),
        (
            tar_of(
                {"query": {"text": "q", "image": None, "id": 1e999}, "target": {"text": "t", "image": None}}
            ),
            "no content id",
        ),
        (
            tar_of({**record("q", None), "query": {"text": "q", "image": None, "id": 10**30}}),
            f"{10**30} is no content id",
        ),
        (tar_of(b"[" * 100_000), r"^s.tar:k.json: not a sample's record"),
        (
            tar_of(record("\ud800", None)),
            r"^s.tar:k.json: query: text '\\ud800' holds half a surrogate pair at character 0",
        ),
        (tar_of(record(5, None)), r"^s.tar:k.json: query: a text must be a str, found int 5"),
        (tar_of(record(None, None)), r"^s.tar:k.json: query: a text must be a str, found NoneType None"),
        (
            tar_of(record("no placeholder"), query_png=RED),
            r"^s.tar:k.json: query: <\|image_1\|> appears 0 times in text 'no placeholder'; beside an image",
        ),
        (
            tar_of(record("<|image_1|>", None)),
            r"^s.tar:k.json: query: <\|image_1\|> appears 1 times in text .*; without an image",
        ),
        (tar_of(record(), query_png=b"no image"), r"^s.tar:k.query.png: is text \('no image'\), not one of"),
        (tar_of(record(), query_png=RED[:-20]), r"^s.tar:k.query.png: is a damaged PNG: image file is trunc"),
    ],
)
def test_each_error_starts_with_the_address(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(parse_sample(content, "s.tar", no_other_bytes))


def test_a_sparse_member_claims_no_memory() -> None:
    header = tarfile.TarInfo("k.query.png")
    header.size, header.type = 0, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410], block[483:495] = b"00000000000\0", b"00000000000\0", b"77777777777\0"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    with pytest.raises(DataError, match=r"k.query.png: not a plain member"):
        parse_sample(bytes(block) + tar_of(record()), "s.tar", no_other_bytes)


def test_a_negative_is_decoded_when_it_is_wanted() -> None:
    negatives = {
        "negative": {"text": "n", "image": None, "id": 3},
        "negative_1": {"text": "<|image_1|>", "image": "negative_1.png", "id": 4},
        "negative_2": {"text": "o", "image": None, "id": 5},
    }
    blue = encoded(Image.new("RGB", (4, 4), "blue"))
    with pytest.raises(DataError, match=r"member or field 'negative_1.png' is missing"):
        parse_sample(tar_of({**record(), **negatives}, query_png=RED), "s.tar", no_other_bytes)
    negatives["negative_1"] |= {"image": "j.negative_1.png", "at": [0, len(blue)]}
    sample = parse_sample(tar_of({**record(), **negatives}, query_png=RED), "s.tar", lambda *_: blue)
    example = decode(sample)
    assert [item.text for item in example.negatives] == ["n", "<|image_1|>", "o"]
    assert example.negatives[1].image is not None
    assert example.negatives[1].image.getpixel((0, 0)) == (0, 0, 255)
    assert example.negative_ids == (3, 4, 5)
    assert [item.address.rpartition(" ")[2] for item in example.items] == list(roles_of(sample.record))
    without = decode(sample, with_negatives=False)
    assert (without.negatives, without.negative_ids, len(without.items)) == ((), (), 2)


def test_an_image_of_an_earlier_sample_is_read_from_where_the_record_says() -> None:
    asked = []

    def read_range(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return RED

    content = tar_of(
        {**record(image="j.query.png"), "query": {**record(image="j.query.png")["query"], "at": [1024, 70]}}
    )
    sample = parse_sample(content, "s.tar", read_range)
    assert asked == [(1024, 70)]
    assert sample.images["query"].address == "s.tar:j.query.png"
    for at in ("x", [1], {"a": 1}):
        broken = tar_of({"query": {"text": "<|image_1|>", "image": "j.query.png", "at": at, "id": 1}})
        with pytest.raises(DataError, match=r"^s.tar:k.json: not a sample's record"):
            parse_sample(broken, "s.tar", read_range)


# ------------------------------------------------------------------ the reader


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out", manifest


def test_reader_finds_every_sample_of_every_source(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    reader = ShardReader(LocalFolder(folder), manifest)
    for name, source in manifest.sources.items():
        rows = [reader.read(name, i).record["row"] for i in range(source.num_samples)]
        assert rows == list(range(source.num_samples))
        assert reader.read(name, 10).address == f"{name}-00001.tar:000000010"


def test_truncated_shard_wrong_offset_and_missing_file_are_named(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    shard = folder / "Shapes_t2i/Shapes_t2i-00000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    reader = ShardReader(LocalFolder(folder), manifest)
    with pytest.raises(DataError, match=r"^Shapes_t2i-00000.tar: truncated at byte"):
        reader.read("Shapes_t2i", 9)
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match=r"^Shapes_t2i-00000.tar: the index points at no tar member"):
        reader.read("Shapes_t2i", 0)
    shard.write_bytes(content[512:] + bytes(512))
    with pytest.raises(DataError, match=r"^Shapes_t2i-00000.tar: "):
        reader.read("Shapes_t2i", 0)
    shard.unlink()
    with pytest.raises(StorageError, match=r"^Shapes_t2i-00000.tar: cannot read the shard"):
        reader.read("Shapes_t2i", 0)


def test_ranges_outside_of_the_shard_are_refused(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    source = manifest.sources["Shapes_i2t"]
    size = source.shards[0].size_bytes
    for offset, length in ((size - 512, 1024), (-512, 512), (0, 0), (0, 2**40)):
        samples = [[(offset, length)] * shard.num_samples for shard in source.shards]
        index = write_index(folder / "Shapes_i2t", samples)
        changed = replace(manifest, sources={**manifest.sources, "Shapes_i2t": replace(source, index=index)})
        with pytest.raises(DataError, match=r"^Shapes_i2t-00000.tar: bytes .* are not in a shard of"):
            ShardReader(LocalFolder(folder), changed).read("Shapes_i2t", 0)


def test_index_that_disagrees_with_the_manifest_is_refused(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    (folder / "Shapes_t2i/index.arrow").write_bytes((folder / "Shapes_VQA/index.arrow").read_bytes())
    with pytest.raises(DataError, match=r"Shapes_t2i/index.arrow: the index has .* samples, the manifest"):
        ShardReader(LocalFolder(folder), read_manifest(LocalFolder(folder)))
    (folder / "Shapes_t2i/index.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"index.arrow: cannot read the index"):
        ShardReader(LocalFolder(folder), read_manifest(LocalFolder(folder)))
