"""Images are looked at before the scoring: cheaply, without a false alarm, and a cut file is found."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from agff.batch import IMAGE_FORMATS
from agff.errors import DataError
from data_pipeline.layouts.eval_items import EmbeddedImage
from launcher.evaluation.image_files import checked_size, open_embedded

NOISE = Image.effect_noise((90, 60), 80).convert("RGB")


def encoded(image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    NOISE.save(file, image_format, **options)
    return file.getvalue()


def forms(tmp_path: Path, content: bytes) -> tuple[Path, EmbeddedImage]:
    path = tmp_path / "image"
    path.write_bytes(content)
    return path, EmbeddedImage(content, name="x.png")


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_whole_image_has_its_size(tmp_path: Path, image_format: str) -> None:
    for image in forms(tmp_path, encoded(image_format)):
        assert checked_size(image) == (90, 60)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9])
def test_cut_image_is_refused_with_its_name(tmp_path: Path, image_format: str, share: float) -> None:
    content = encoded(image_format)
    for image, name in zip(
        forms(tmp_path, content[: int(share * len(content))]), ("image", "x.png"), strict=True
    ):
        with pytest.raises(DataError, match=rf"{name}: cannot read the image"):
            checked_size(image)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_what_follows_a_whole_image_does_not_matter(tmp_path: Path, image_format: str) -> None:
    for image in forms(tmp_path, encoded(image_format) + b"\0" * 5000):
        assert checked_size(image) == (90, 60)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in forms(tmp_path, encoded("JPEG", exif=exif)):
        assert checked_size(image) == ((60, 90) if orientation >= 5 else (90, 60))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_pixels_of_a_whole_image_are_not_decoded(tmp_path: Path, image_format: str) -> None:
    content = encoded(image_format)
    damaged = content[: len(content) // 2] + b"\xff\xd8" * 50 + content[len(content) // 2 + 100 :]
    for image in forms(tmp_path, damaged):
        assert checked_size(image) == (90, 60)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.png: cannot read the image"):
        checked_size(tmp_path / "gone.png")


def test_embedded_image_is_opened_or_refused() -> None:
    assert open_embedded(EmbeddedImage(encoded("PNG"), name="a")).tobytes() == NOISE.tobytes()
    damaged = bytearray(encoded("PNG"))
    damaged[len(damaged) // 2] ^= 255
    for content in (b"", b"x", bytes(damaged)):
        with pytest.raises(DataError, match=r"a: cannot read the image"):
            open_embedded(EmbeddedImage(content, name="a"))
