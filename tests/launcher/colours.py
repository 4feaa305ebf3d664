"""Two sets and two minimal pairs of three colours, and a model whose vectors are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from agff.batch import Item, TextRule
from agff.embedder import Embedder
from agff.errors import DataError
from agff.nested import Truncations
from agff.processor import ProcessorConfig
from agff.similarity import FusionConfig
from data_pipeline.layouts.eval_items import EvalItem

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NOTE = "these sets imitate the format, not the difficulty."


class AnyLength:
    """A processor that refuses nothing but the text `refused`."""

    limits = ProcessorConfig()
    cells: object = None

    def __init__(self, refused: str) -> None:
        self.refused = refused

    def __call__(self, items: Sequence[Item]) -> Any:
        return {"items": [item for item in items if self.num_tokens(item)]}

    def num_tokens(self, item: Item) -> int:
        if self.refused and self.refused in item.text:
            raise DataError(f"refused: {item.text}")
        return len(item.text)


class ColourModel(Embedder):
    """Embeds an image as its colour and a text as the colour it names; `confused` maps one colour name to
    another, the processor refuses a text with `refused`."""

    device = torch.device("cpu")
    dtype = torch.float32
    weights_sha256 = "colours"

    def __init__(self, confused: Mapping[str, str] | None = None, *, refused: str = "") -> None:
        self.confused = confused or {}
        self.processor: Any = AnyLength(refused)
        self.fusion = FusionConfig(beta=0.1)
        self.truncations = Truncations()
        self.texts = TextRule()
        self.encoded: list[tuple[str, str]] = []
        self.batch_sizes: list[int] = []

    def encode_inputs(self, inputs: Any) -> Tensor:
        items = inputs["items"]
        self.batch_sizes.append(len(items))
        self.encoded += [(item.text, item.address if item.image else "") for item in items]
        return torch.stack([self._vector(item) for item in items])[:, None, :]

    def similarity(self, a_NMD: Tensor, b_CMD: Tensor) -> Tensor:
        return a_NMD[:, 0] @ b_CMD[:, 0].T

    def _vector(self, item: Item) -> Tensor:
        if item.image is not None:
            return torch.tensor(item.image.getpixel((0, 0))) / 255
        name = next(word for word in COLOURS if word in item.text)
        return torch.tensor(COLOURS[self.confused.get(name, name)]) / 255


def write_benchmarks(tmp_path: Path) -> Path:
    """`mmeb/` with one text-to-image and one image-to-text set of three colours, `mmvp/` with two pairs,
    `run/`."""
    mmeb, mmvp = tmp_path / "mmeb", tmp_path / "mmvp"
    names = list(COLOURS)
    for folder in (
        mmeb / "images/T2I",
        mmvp / "MLLM_VLM Images/Colour",
        mmeb / "T2I",
        mmeb / "I2T",
        tmp_path / "run",
    ):
        folder.mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (2, 2), colour).save(mmeb / f"images/T2I/{name}.png")
    t2i, i2t = [], []
    for name in names:
        order = [name, *(other for other in names if other != name)]
        images = [f"T2I/{other}.png" for other in order]
        t2i.append({"qry_text": f"Find {name}\n", "qry_img_path": "", "tgt_text": "", "tgt_img_path": images})
        query = "<|image_1|>\nName it.\n"
        i2t.append(
            {"qry_text": query, "qry_img_path": images[0], "tgt_text": order, "tgt_img_path": [""] * 3}
        )
    pq.write_table(pa.Table.from_pylist(t2i), mmeb / "T2I/test.parquet")
    pq.write_table(pa.Table.from_pylist(i2t), mmeb / "I2T/test.parquet")
    sets = {
        "I2T": {"meta_task": "classification", "in_distribution": True, "note": NOTE},
        "T2I": {"meta_task": "retrieval", "in_distribution": False, "note": NOTE},
    }
    (mmeb / "sets.json").write_text(json.dumps(sets))
    lines = ["Question ID,Type,Statement"]
    for number, name in enumerate(["red", "green", "green", "blue"], start=1):
        lines.append(f"{number},Colour,a {name} thing")
        Image.new("RGB", (2, 2), COLOURS[name]).save(mmvp / f"MLLM_VLM Images/Colour/{number}.png")
    (mmvp / "Questions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def table_of(*items: str) -> dict[str, Any]:
    """Name, items, addresses and findings of a set: texts, with `@` before the file of an image."""
    parts = [item.partition("@") for item in items]
    return {
        "name": "S",
        "items": tuple(EvalItem(text, Path(image) if image else None) for text, _, image in parts),
        "addresses": tuple(f"S/test.parquet:row {number}" for number in range(len(items))),
        "findings": {},
    }
