from __future__ import annotations

import io
import os
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from agff import images
from agff.batch import Item
from agff.embedder import as_item
from agff.errors import DataError
from agff.images import FORMATS, SHARD_FORMATS, decode_image, open_image, read_header, read_image_file
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.decode import decode
from data_pipeline.reader import RawImage, RawSample
from tests.drawings import tiny_backbone

ADDRESS = "train-00017.tar:000123.query.jpg"
ORIENTATION = 0x0112
SIZE = (40, 28)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def pixel_of(image: Image.Image, at: tuple[int, int] = (1, 1)) -> object:
    return open_image(image, "x").getpixel(at)


def scene(mode: str) -> Image.Image:
    """A picture without any symmetry, in a mode of Pillow."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    grey = (x * 5 + y) % 256
    if mode in ("I", "I;16", "I;16B"):
        levels = (grey * 257).astype({"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode])
        return Image.frombytes(mode, SIZE, levels.tobytes())
    rgb = Image.fromarray(np.stack([grey, y * 9 % 256, (x + y) * 3 % 256], axis=-1).astype(np.uint8))
    alpha = Image.fromarray((x * 6 % 256).astype(np.uint8))
    if mode in ("RGBA", "RGBa", "LA", "La"):
        rgb.putalpha(alpha)
        return rgb.convert("LA" if mode in ("LA", "La") else "RGBA").convert(mode)
    if mode == "PA":
        return _palette_with_alpha(rgb, alpha)
    if mode in ("P", "P+tRNS"):
        palette = rgb.quantize(16)
        if mode == "P+tRNS":
            palette.info["transparency"] = bytes(range(0, 256, 16))
        return palette
    if mode in ("L+tRNS", "RGB+tRNS"):
        image = rgb.convert(mode.removesuffix("+tRNS"))
        image.info["transparency"] = image.getpixel((3, 3))
        return image
    if mode == "HSV":
        return rgb.convert("HSV")
    return rgb.convert(mode)


def _palette_with_alpha(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    both = rgb.copy()
    both.putalpha(alpha)
    return both.convert("PA")


MODES_OF_FORMAT = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "L+tRNS", "LA", "P", "P+tRNS", "RGB", "RGB+tRNS", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "P+tRNS"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I;16B", "I", "F"),
    "PPM": ("1", "L", "RGB", "I"),
}
"""What Pillow writes and reads of each format."""
CARRY_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")
MODES = sorted({mode for modes in MODES_OF_FORMAT.values() for mode in modes})
FILES = [(kind, mode) for kind, modes in MODES_OF_FORMAT.items() for mode in modes]


def test_every_format_is_among_the_cases() -> None:
    assert set(MODES_OF_FORMAT) == set(FORMATS)


def file_of(kind: str, mode: str, orientation: int = 1) -> bytes:
    image, options = scene(mode), {}
    if orientation != 1:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    if "transparency" in image.info:
        options["transparency"] = 3 if kind == "GIF" else image.info["transparency"]
    if kind == "WEBP":
        options["lossless"] = True
    return encoded(image, kind, **options)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ItemProcessor:
    return ItemProcessor.from_folder(
        tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny"),
        prompts=PromptConfig(num_fine=1),
        limits=ProcessorConfig(),
    )


def trained(content: bytes) -> Item:
    raw = RawSample(
        address="s.tar:k",
        record={
            "query": {"text": "<|image_1|>\nwhat?\n", "image": "query.x", "id": 1},
            "target": {"text": "t", "image": None, "id": 2},
        },
        images={"query": RawImage(address="s.tar:k.query.x", content=content)},
    )
    return decode(raw, seen_pixels=10**9).query


@pytest.mark.parametrize(("kind", "mode"), FILES)
def test_all_roads_give_the_model_the_same_tensors(
    kind: str, mode: str, tmp_path: Path, processor: ItemProcessor
) -> None:
    path = tmp_path / "picture"
    for orientation in range(1, 9) if kind in CARRY_EXIF else (1,):
        content = file_of(kind, mode, orientation)
        path.write_bytes(content)
        loaded = opened(content)
        loaded.load()
        given = [
            *([trained(content)] if kind in SHARD_FORMATS else []),
            *(
                as_item({"text": "what?", "image": image})
                for image in (path, str(path), opened(content), loaded, open_image(path, "once already"))
            ),
        ]
        assert {item.text for item in given} == {"<|image_1|>\nwhat?\n"}
        tensors = [processor([item]) for item in given]
        for other in tensors[1:]:
            assert other.keys() == tensors[0].keys()
            for name, tensor in other.items():
                assert torch.equal(tensor, tensors[0][name]), f"{name}, orientation {orientation}"
        upright = (SIZE[1], SIZE[0]) if orientation >= 5 else SIZE
        assert {item.image.size for item in given if item.image} == {upright}
        assert read_header(path, "x", formats=FORMATS).size == upright
        assert read_header(content, "x", formats=FORMATS).format == kind


@pytest.mark.parametrize("kind", CARRY_EXIF)
def test_orientation_is_applied_once(kind: str) -> None:
    straight = np.asarray(open_image(opened(file_of(kind, "RGB")), "x"))
    for orientation, undo in {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }.items():
        content = file_of(kind, "RGB", orientation)
        seen = open_image(opened(content), "x")
        assert np.array_equal(np.asarray(seen), undo(straight)), orientation
        for again in (seen, ImageOps.exif_transpose(opened(content)), opened(content).convert("RGB")):
            assert np.array_equal(np.asarray(open_image(again, "x")), np.asarray(seen)), orientation


@pytest.mark.parametrize(
    ("tag", "type_", "count", "value"),
    [
        (258, 4, 1, struct.pack("<I", 70_000)),
        (258, 9, 1, struct.pack("<i", -5)),
        (258, 7, 4, b"abcd"),
        (259, 11, 1, struct.pack("<f", 1.5)),
        (256, 2, 3, b"ab\0\0"),
        (34665, 4, 1, struct.pack("<I", 999_999)),
    ],
    ids=["large", "negative", "bytes", "float", "text", "beyond the end"],
)
def test_other_tags_of_another_type_than_usual_cost_no_turned_photo(
    tag: int, type_: int, count: int, value: bytes
) -> None:
    tags = sorted([(ORIENTATION, 3, 1, struct.pack("<HH", 6, 0)), (tag, type_, count, value)])
    entries = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in tags)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    content = encoded(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)
    assert decode_image(content, "x", formats=FORMATS).size == (4, 8)
    assert open_image(opened(content), "x").size == (4, 8)


@pytest.mark.parametrize("mode", [*MODES, "La", "RGBa", "HSV", "YCbCr", "RGBX"])
def test_every_mode_becomes_rgb_and_the_image_that_was_given_stays(mode: str) -> None:
    given = scene(mode)
    before = (given.mode, given.size, given.tobytes(), dict(given.info))
    seen = open_image(given, "x")
    assert images.is_as_model_sees(seen)
    assert seen.info == {}
    assert seen is not given
    assert (given.mode, given.size, given.tobytes(), dict(given.info)) == before


def test_rgb_with_a_transparent_colour_is_not_as_the_model_sees_it() -> None:
    keyed = Image.new("RGB", (4, 4), "red")
    keyed.info["transparency"] = (255, 0, 0)
    assert not images.is_as_model_sees(keyed)
    assert open_image(keyed, "x").getpixel((0, 0)) == (255, 255, 255)


BLEND = 255 - 128  # white behind black of alpha 128


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (BLEND,) * 3),
        (Image.new("RGBa", (4, 4), (0, 0, 0, 128)), (BLEND,) * 3),
        (Image.new("LA", (4, 4), (0, 128)), (BLEND,) * 3),
        (Image.new("La", (4, 4), (0, 128)), (BLEND,) * 3),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("I;16", (4, 4), 0x80FF), (0x80,) * 3),
        (Image.frombytes("I;16B", (4, 4), b"\x80\xff" * 16), (0x80,) * 3),
        (Image.new("I", (4, 4), 0x80FF), (0x80,) * 3),
        (Image.new("F", (4, 4), 127.9), (127,) * 3),
        (Image.new("F", (4, 4), 0.0), (0,) * 3),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("YCbCr", (4, 4), (77, 128, 128)), (77, 77, 77)),
        (Image.new("HSV", (4, 4), (0, 0, 77)), (77, 77, 77)),
    ],
)
def test_levels_of_every_mode(image: Image.Image, pixel: tuple[int, ...]) -> None:
    assert pixel_of(image) == pixel


def test_palette_with_alpha_is_blended_with_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128)).convert("PA")
    assert pixel_of(image) == (BLEND,) * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    for transparency, pixel in ((1, (255,) * 3), (b"\xff\x80", (BLEND,) * 3), (0, (0, 0, 0))):
        assert pixel_of(opened(encoded(palette, "PNG", transparency=transparency))) == pixel
    entries = palette.copy()
    entries.putpalette([255, 0, 0, 255, 0, 0, 0, 128], "RGBA")
    assert pixel_of(entries) == (BLEND,) * 3


def test_sixteen_bits_keep_their_upper_eight() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for given in (levels, levels.astype(np.int32)):
        seen = np.asarray(open_image(Image.fromarray(given), "x"))
        assert np.array_equal(seen, np.repeat((levels >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def png(depth: int, color: int, row: bytes, key: bytes) -> bytes:
    """Two pixels, by hand: Pillow writes no such depths."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, color, 0, 0, 0)) + chunk(b"tRNS", key)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "color", "row", "key"),
    [
        (1, 0, b"\x40", [0]),
        (2, 0, b"\x10", [0]),
        (2, 0, b"\x90", [2]),
        (4, 0, b"\x71", [7]),
        (8, 0, b"\x77\x11", [0x77]),
        (16, 0, struct.pack(">2H", 0x1234, 0x1111), [0x1234]),
        (8, 2, b"\x12\x34\x56\x01\x02\x03", [0x12, 0x34, 0x56]),
        (16, 2, struct.pack(">6H", 0x12FF, 0x34FF, 0x56FF, 1, 2, 3), [0x12FF, 0x34FF, 0x56FF]),
    ],
)
def test_a_transparent_level_of_every_depth_is_white(
    depth: int, color: int, row: bytes, key: list[int]
) -> None:
    content = png(depth, color, row, struct.pack(f">{len(key)}H", *key))
    image = opened(content)
    for seen in (
        decode_image(content, "x", formats=FORMATS),
        open_image(image, "x"),
        open_image(image, "the same object again"),
    ):
        assert seen.getpixel((0, 0)) == (255, 255, 255)
        assert seen.getpixel((1, 0)) != (255, 255, 255) or depth == 1


@pytest.mark.parametrize(
    ("mode", "levels"),
    [
        ("F", [0, 256]),
        ("F", [-1, 3]),
        ("F", [0, float("nan")]),
        ("F", [0, 1]),  # 255 levels or 1?
        ("I", [0, 65536]),
        ("I", [-1, 300]),
        ("I", [0, 255]),  # 8 bits or 16?
    ],
)
def test_levels_of_which_nobody_knows_what_is_white_are_refused(mode: str, levels: list[float]) -> None:
    image = Image.fromarray(np.array([levels], dtype=np.float32 if mode == "F" else np.int32))
    with pytest.raises(DataError, match=rf"^a\.tif: has levels from .* in Pillow's mode {mode}, where 0 is"):
        open_image(image, "a.tif")


def test_adobe_cmyk_is_not_inverted() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in content
    red, green, blue = decode_image(content, "x", formats=FORMATS).getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_pictures_the_first_is_taken(kind: str, tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    path = tmp_path / "several"
    red.save(path, kind, save_all=True, append_images=[blue])
    assert open_image(path, "x").getpixel((8, 8))[0] > 245
    with Image.open(path) as later:
        later.seek(1)
        seen = open_image(later, "x").getpixel((8, 8))
    assert seen[2] > 245, "a PIL object is at a picture of its caller's"


def test_a_large_jpeg_is_decoded_small_for_training_and_its_tensors_are_close(
    processor: ItemProcessor,
) -> None:
    y, x = np.mgrid[0:1600, 0:1200]
    rgb = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), (x + y) / 2800 * 255], axis=-1)
    exif = Image.Exif()
    for orientation, upright in ((1, (600, 800)), (6, (800, 600))):
        exif[ORIENTATION] = orientation
        content = encoded(Image.fromarray(rgb.astype(np.uint8)), "JPEG", quality=90, exif=exif)
        whole = decode_image(content, ADDRESS, formats=SHARD_FORMATS)
        small = decode_image(content, ADDRESS, formats=SHARD_FORMATS, seen_pixels=200 * 200)
        assert small.size == upright, "at least twice what is seen, 173 x 231"
        assert whole.width * whole.height == 1600 * 1200
        first, second = (
            processor([Item(text="<|image_1|>", image=image)])["pixel_values"] for image in (whole, small)
        )
        assert first.shape == second.shape
        # a level of 255 is 0.015 in normalised pixels
        assert (first - second).abs().mean() < 0.015
        same = decode_image(content, ADDRESS, formats=SHARD_FORMATS, seen_pixels=1200 * 1600)
        assert same.size == whole.size
    lossless = encoded(whole, "PNG")
    assert decode_image(lossless, ADDRESS, formats=FORMATS, seen_pixels=200 * 200).size == whole.size


RED = encoded(Image.new("RGB", (4, 4), "red"), "PNG")
NOISE = Image.effect_noise((300, 300), 50)
UNUSABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(5000), "is zero bytes, not one of JPEG, PNG, WEBP"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "is a Git LFS pointer (git lfs pull fetches the image), not one of JPEG, PNG, WEBP",
    ),
    "annex": (b"/annex/objects/SHA256E-s3--00.jpg\n", "is a git-annex pointer (git annex get fetches the"),
    "html": (b"\n<!DOCTYPE html>\n<html>404</html>", "is an HTML page, not one of JPEG, PNG, WEBP"),
    "json": (b'{"error": "gone"}', 'is text (\'{"error": "gone"}\'), not one of JPEG, PNG, WEBP'),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "is SVG, not one of"),
    "avif": (encoded(Image.new("RGB", (20, 20)), "AVIF"), "is AVIF, not one of JPEG, PNG, WEBP"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, not one of JPEG, PNG, WEBP"),
    "jpeg 2000": (encoded(Image.new("RGB", (20, 20)), "JPEG2000"), "is JPEG 2000, not one of"),
    "eps": (encoded(Image.new("RGB", (20, 20)), "EPS"), "is EPS, not one of"),
    "ico": (encoded(Image.new("RGB", (20, 20)), "ICO"), "is ICO, not one of"),
    "pdf": (encoded(Image.new("RGB", (20, 20)), "PDF"), "is PDF, not one of"),
    "zip": (b"PK\3\4" + bytes(30), "is a ZIP archive, not one of"),
    "bytes": (
        b"\x91\x92\x93\x94",
        "is of no known format (it begins with the bytes 91 92 93 94), not one of",
    ),
    "cut jpeg": (encoded(NOISE, "JPEG")[:2000], "is a damaged JPEG: image file is truncated"),
    "cut png": (encoded(NOISE, "PNG")[:2000], "is a damaged PNG: image file is truncated"),
    "cut webp": (encoded(NOISE, "WEBP")[:2000], "is a damaged WEBP: "),
    "head of a jpeg": (b"\xff\xd8\xff no more", "is a damaged JPEG: its header cannot be read"),
}
ROADS: dict[str, Callable[[bytes, Path], object]] = {
    "training": lambda content, path: decode_image(content, ADDRESS, formats=SHARD_FORMATS),
    "prepare": lambda content, path: read_header(content, ADDRESS, formats=SHARD_FORMATS),
    "verify": lambda content, path: read_header(path, ADDRESS, formats=SHARD_FORMATS),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_image_is_named_as_what_it_is_in_the_same_words_everywhere(
    name: str, tmp_path: Path
) -> None:
    content, words = UNUSABLE[name]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    messages = set()
    for _ in range(2):
        for road in ROADS.values():
            with pytest.raises(DataError) as caught:
                road(content, path)
            messages.add(str(caught.value))
    assert len(messages) == 1, messages
    message = messages.pop()
    assert message.startswith(f"{ADDRESS}: {words}")
    assert " object at " not in message
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: is ") as caught:
        as_item(path)
    assert str(caught.value) == message.replace(ADDRESS, str(path)).replace(
        "JPEG, PNG, WEBP", ", ".join(FORMATS)
    )


def test_other_formats_than_a_run_takes_are_named() -> None:
    for kind in set(FORMATS) - set(SHARD_FORMATS):
        content = encoded(Image.new("RGB", (8, 8)), kind)
        decode_image(content, "x", formats=FORMATS)
        with pytest.raises(DataError, match=f"^a.jpg: is {kind}, not one of JPEG, PNG, WEBP$"):
            decode_image(content, "a.jpg", formats=SHARD_FORMATS)


def test_names_that_are_no_files(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "absent.png", "is missing"),
        (tmp_path, "is not the name of a file: Is a directory"),
        (tmp_path / "nul\0.png", "is not the name of a file: embedded null byte"),
        (tmp_path / ("x" * 300), "is not the name of a file: File name too long"),
    ):
        for road in (read_image_file, lambda p, a: read_header(p, a, formats=FORMATS), open_image):
            with pytest.raises(DataError, match=f"^a: {words}"):
                road(path, "a")


def test_a_pipe_or_device_is_no_file(tmp_path: Path) -> None:
    """One would be waited for, the other has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "endless.png"):
        for read in (read_image_file, lambda *what: read_header(*what, formats=FORMATS)):
            with pytest.raises(DataError, match="here: is a device, pipe or socket, not a file"):
                read(tmp_path / name, "here")


def test_a_failing_file_system_is_no_fault_of_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(RED)

    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Failing())
    with pytest.raises(OSError, match="Input/output error"):
        read_image_file(path, "a")
    with pytest.raises(OSError, match="Input/output error"):
        read_header(path, "a", formats=FORMATS)
    with pytest.raises(DataError, match=r"^a: cannot be read: Input/output error"):
        open_image(path, "a")


def test_too_much_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    roads: list[Callable[[], object]] = [
        *(lambda road=road: road(RED, path) for road in ROADS.values()),  # type: ignore[misc]
        lambda: open_image(path, ADDRESS),
        lambda: open_image(opened(RED), ADDRESS),
    ]
    monkeypatch.setattr(images, "MAX_PIXELS", 15)
    for road in roads:
        with pytest.raises(DataError, match=f"^{ADDRESS}: has 4 x 4 pixels, more than 15$"):
            road()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)  # Pillow refuses at twice its limit
    for road in roads[:4]:
        with pytest.raises(DataError, match=f"^{ADDRESS}: has more than 15 pixels$"):
            road()
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 50)
    for road in roads[:4]:
        with pytest.raises(DataError, match=rf"^{ADDRESS}: has {len(RED)} bytes, more than 50$"):
            road()


def test_no_pixels_at_all() -> None:
    with pytest.raises(DataError, match=r"^a: has 0 x 3 pixels"):
        open_image(Image.new("RGB", (0, 3)), "a")


def test_an_image_whose_file_is_closed_is_an_error_that_says_so() -> None:
    image = opened(RED)
    image.close()
    with pytest.raises(DataError, match=r"^a: cannot be decoded: .*closed"):
        open_image(image, "a")


def test_damaged_images_are_data_errors_whatever_pillow_raises() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "maker"
    generator, messages = random.Random(0), set()
    for kind in FORMATS:
        options = {"exif": exif} if kind in CARRY_EXIF else {}
        whole = encoded(Image.new("RGB", (16, 8), "red"), kind, **options)
        for _ in range(300):
            content = bytearray(whole)
            for _ in range(generator.randint(1, 4)):
                content[generator.randrange(min(len(content), 200))] = generator.randrange(256)
            for road in (decode_image, read_header):
                try:
                    road(bytes(content), ADDRESS, formats=FORMATS)
                except DataError as error:
                    messages.add(str(error))
    assert [m for m in messages if not m.startswith(f"{ADDRESS}: ") or " at 0x" in m] == []


def test_no_image_makes_a_program_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript."""
    mark, ghostscript = tmp_path / "ran", tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {mark}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match="is EPS, not one of"):
        decode_image(UNUSABLE["eps"][0], ADDRESS, formats=FORMATS)
    assert not mark.exists()
