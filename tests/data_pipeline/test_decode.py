from __future__ import annotations

import contextlib
import io
import json
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agff.batch import NO_CONTENT, Item
from agff.errors import DataError, StorageError
from data_pipeline import decode as decode_module
from data_pipeline.convert import prepare
from data_pipeline.decode import decode, decode_image
from data_pipeline.manifest import Manifest, read_manifest, write_index
from data_pipeline.reader import ShardReader, parse_sample
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


def record(text: str = "<|image_1|>\nx", image: str | None = "query.png") -> dict:
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
        (tar_of(record("\ud800", None)), r"^s.tar:k.json: not a sample's record: .*surrogates not allowed"),
        (
            tar_of(record("no placeholder"), query_png=RED),
            r"^s.tar:k.json: <\|image_1\|> stands 0 times, images: 1",
        ),
        (tar_of(record("<|image_1|>", None)), r"^s.tar:k.json: <\|image_1\|> stands 1 times, images: 0"),
        (tar_of(record(), query_png=b"no image"), r"^s.tar:k.query.png: 8 bytes that are no image"),
        (tar_of(record(), query_png=RED[:-20]), r"^s.tar:k.query.png: cannot decode \d+ bytes"),
    ],
)
def test_each_error_starts_with_the_address(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(parse_sample(content, "s.tar", no_other_bytes))


def test_truncated_jpeg_is_an_error_not_half_an_image() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, "JPEG")
    decode_image(whole, ADDRESS)
    with pytest.raises(DataError, match=ADDRESS):
        decode_image(whole[: len(whole) // 2], ADDRESS)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 15)
    with pytest.raises(DataError, match="4 x 4 pixels, more than 15"):
        decode_image(RED, ADDRESS)


def test_images_of_every_mode_become_upright_rgb_on_white() -> None:
    palette = Image.new("RGB", (4, 4), "red").quantize(4)
    grey16 = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    cases = [
        (encoded(palette), (255, 0, 0)),
        (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(grey16), (0x80, 0x80, 0x80)),
        (encoded(clear), (255, 255, 255)),
        (encoded(clear, "WEBP", lossless=True), (255, 255, 255)),
        (encoded(Image.new("LA", (4, 4), (0, 255))), (0, 0, 0)),
    ]
    for content, pixel in cases:
        image = decode_image(content, ADDRESS)
        assert image.mode == "RGB"
        assert image.getpixel((1, 1)) == pixel
    assert decode_image(encoded(Image.new("CMYK", (4, 4)), "JPEG"), ADDRESS).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    assert decode_image(encoded(Image.new("RGB", (4, 8)), "JPEG", exif=exif), ADDRESS).size == (8, 4)


def test_no_image_makes_a_program_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript."""
    mark, ghostscript = tmp_path / "ran", tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {mark}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DataError, match="bytes that are no image"):
        decode_image(encoded(Image.new("RGB", (8, 8)), "EPS"), ADDRESS)
    assert not mark.exists()


def test_damaged_images_are_data_errors_whatever_pillow_raises() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    generator = random.Random(0)
    for kind in ("JPEG", "WEBP", "PNG"):
        whole = encoded(Image.new("RGB", (16, 8), "red"), kind, exif=exif)
        for _ in range(700):
            content = bytearray(whole)
            for _ in range(generator.randint(1, 4)):
                content[generator.randrange(min(len(content), 200))] = generator.randrange(256)
            with contextlib.suppress(DataError):
                decode_image(bytes(content), ADDRESS)


def test_a_sparse_member_claims_no_memory() -> None:
    header = tarfile.TarInfo("k.query.png")
    header.size, header.type = 0, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410], block[483:495] = b"00000000000\0", b"00000000000\0", b"77777777777\0"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    with pytest.raises(DataError, match=r"k.query.png: not a plain member"):
        parse_sample(bytes(block) + tar_of(record()), "s.tar", no_other_bytes)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same_to_the_model() -> None:
    y, x = np.mgrid[0:1600, 0:1200]
    scene = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), (x + y) / 2800 * 255], axis=-1)
    content = encoded(Image.fromarray(scene.astype(np.uint8)), "JPEG", quality=90)
    whole = decode_image(content, ADDRESS)
    seen = 200 * 200
    small = decode_image(content, ADDRESS, seen_pixels=seen)
    assert (whole.size, small.size) == ((1200, 1600), (600, 800)), "at least twice what is seen: 173 x 231"
    target = (173, 231)
    first, second = (
        np.asarray(image.resize(target, Image.Resampling.BICUBIC), dtype=float) for image in (whole, small)
    )
    assert np.abs(first - second).mean() < 1.5
    assert decode_image(content, ADDRESS, seen_pixels=1200 * 1600).size == whole.size
    assert decode_image(encoded(whole, "PNG"), ADDRESS, seen_pixels=seen).size == whole.size, (
        "PNG has no such mode"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encoded(whole, "JPEG", exif=exif), ADDRESS, seen_pixels=seen)
    assert turned.size == (800, 600)


def test_a_negative_is_decoded_when_it_is_wanted() -> None:
    content = tar_of({**record(), "negative": {"text": "n", "image": None, "id": 3}}, query_png=RED)
    sample = parse_sample(content, "s.tar", no_other_bytes)
    example = decode(sample)
    assert example.negative == Item(text="n")
    assert example.negative_id == 3
    assert len(example.items) == 3
    without = decode(sample, with_negative=False)
    assert (without.negative, without.negative_id, len(without.items)) == (None, NO_CONTENT, 2)


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
