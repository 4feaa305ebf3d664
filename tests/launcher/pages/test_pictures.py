"""Small copies of images."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from launcher.pages.pictures import THUMBNAIL_PX, make_thumbnail


@pytest.mark.parametrize("size", [(800, 400), (100, 3000), (5000, 2)])
def test_thumbnail_is_small_and_the_image_keeps_its_size(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    thumbnail = make_thumbnail(image)
    with Image.open(io.BytesIO(base64.b64decode(thumbnail.data_uri.partition(",")[2]))) as small:
        assert max(small.size) == THUMBNAIL_PX
    assert thumbnail.original_size == image.size == size
