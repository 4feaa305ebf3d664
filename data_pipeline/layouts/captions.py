"""Images with a caption each, as LLaVA-CC3M-Pretrain-595K is laid out.

<root>/metadata.json   rows {"id", "image", "url", "caption", "blip_caption"}; the caption is blip_caption,
                       else caption
       images/<image>  or <root>/<image>, or below another folder that is named
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agff.batch import MMEB_TEXTS, text_problem
from agff.errors import DataError
from data_pipeline.layouts.json_rows import json_rows
from data_pipeline.layouts.training_rows import IMAGE_ALONE, Pair, Side, below

METADATA_FILE = "metadata.json"
_CAPTIONS = ("blip_caption", "caption")
"""The first that is not empty is taken."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """One source: an image as query, its caption as target."""

    root: Path
    images: Path
    name: str

    @property
    def settings(self) -> Mapping[str, Any]:
        """See Layout."""
        return {"layout": "captions", "images": os.path.relpath(self.images, self.root)}

    def sources(self) -> list[str]:
        """See Layout."""
        return [self.name]

    def count_rows(self, source: str) -> int:
        """See Layout."""
        path = self.root / METADATA_FILE
        rows = json_rows(path)
        if not rows.num_rows:
            raise DataError(f"{path}: no rows; download it again")
        for row in rows.between(0, 1):
            if "image" not in row or not any(name in row for name in _CAPTIONS):
                raise DataError(
                    f"{path}: a row must have image and blip_caption or caption, found {', '.join(row)}"
                )
        return rows.num_rows

    def rows(self, source: str, *, start: int, stop: int) -> Iterator[Pair | str]:
        """See Layout."""
        for row in json_rows(self.root / METADATA_FILE).between(start, stop):
            try:
                yield self._pair(row)
            except DataError as error:
                yield str(error)

    def tables(self, source: str) -> list[Path]:
        """See Layout."""
        return [self.root / METADATA_FILE]

    def _pair(self, row: Mapping[str, Any]) -> Pair:
        image, captions = row.get("image"), [row.get(name) for name in _CAPTIONS]
        if not isinstance(image, str) or not image:
            raise DataError(f"image {image!r:.60} must be a path")
        caption = next((text for text in captions if text not in (None, "")), "")
        if problem := text_problem(caption, has_image=False):
            raise DataError(f"caption: {problem}")
        if not caption.strip():
            raise DataError("caption: blip_caption and caption are empty")
        query = Side(
            text=MMEB_TEXTS.image_alone, image=below(self.images, image, "image"), instruction=IMAGE_ALONE
        )
        return Pair(query=query, target=Side(text=caption.strip()))
