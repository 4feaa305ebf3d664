"""Writers of the public caption layouts, of whatever images and captions a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.layouts.long_captions import SHAREGPT4V_FILE
from data_pipeline.layouts.sugarcrepe import SUBSETS

Captions = Mapping[str, Sequence[str]]
"""{path of an image file: its captions}."""


def write_tables(folder: Path, captions: Captions, *, in_table: bool = True, num_files: int = 1) -> Path:
    """Flickr30k's and COCO's layout; in_table: the image's bytes, as Hugging Face writes them, else paths."""
    rows = [
        {"image": _image(folder, file, in_table), "text": list(texts)} for file, texts in captions.items()
    ]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        part = pa.Table.from_pylist(rows[number::num_files])
        pq.write_table(part, folder / f"data/test-{number:05d}-of-{num_files:05d}.parquet")
    return folder


def write_sharegpt4v(folder: Path, captions: Sequence[tuple[str, str]], *, indent: int | None = None) -> Path:
    """ShareGPT4V's layout from (relative path of the image, caption)."""
    rows = [
        {
            "id": str(number),
            "image": image,
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": caption},
            ],
        }
        for number, (image, caption) in enumerate(captions)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHAREGPT4V_FILE).write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    return folder


def write_urban1k(folder: Path, captions: Captions) -> Path:
    """Urban1k's layout; ids are the positions from 1 on."""
    for name in ("image", "caption"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (file, texts) in enumerate(captions.items(), start=1):
        (folder / f"image/{number}.jpg").write_bytes(Path(file).read_bytes())
        (folder / f"caption/{number}.txt").write_text("\n".join(texts))
    return folder


def write_sugarcrepe(folder: Path, choices: Sequence[tuple[str, str, str]]) -> Path:
    """SugarCrepe's layout from (image file, caption, negative), the same in each subset, under keys with
    gaps."""
    (folder / "val2017").mkdir(parents=True, exist_ok=True)
    for file, _, _ in choices:
        (folder / "val2017" / Path(file).name).write_bytes(Path(file).read_bytes())
    for subset in SUBSETS:
        entries = {
            str(3 * number): {"filename": Path(file).name, "caption": caption, "negative_caption": negative}
            for number, (file, caption, negative) in enumerate(choices)
        }
        (folder / f"{subset}.json").write_text(json.dumps(entries))
    return folder


def _image(folder: Path, file: str, in_table: bool) -> Any:
    if in_table:
        return {"bytes": Path(file).read_bytes(), "path": Path(file).name}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images" / Path(file).name).write_bytes(Path(file).read_bytes())
    return Path(file).name
