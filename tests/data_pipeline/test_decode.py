from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agff.errors import DataError
from data_pipeline import decode as decode_module
from data_pipeline.decode import decode, decode_image
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.reader import ShardReader, parse_sample
from data_pipeline.storage import LocalFolder
from launcher.prepare import prepare
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
        (tar_of(record("no placeholder"), query_png=RED), r"^s.tar:k.json: <\|image_1\|> stands 0 times, images: 1"),
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
    with pytest.raises(DataError, match=r"^Shapes_t2i-00000.tar: cannot read the shard"):
        reader.read("Shapes_t2i", 0)


def test_index_that_disagrees_with_the_manifest_is_refused(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    (folder / "Shapes_t2i/index.arrow").write_bytes((folder / "Shapes_VQA/index.arrow").read_bytes())
    with pytest.raises(DataError, match=r"Shapes_t2i/index.arrow: the index has .* samples, the manifest"):
        ShardReader(LocalFolder(folder), read_manifest(LocalFolder(folder)))
    (folder / "Shapes_t2i/index.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"index.arrow: cannot read the index"):
        ShardReader(LocalFolder(folder), read_manifest(LocalFolder(folder)))
