"""Writers of the three public layouts: MMEB-train, MMEB-eval (8) and MMVP-VLM (9)."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from agff.batch import IMAGE_PLACEHOLDER, MMEB_TEXTS

IMAGE_TARGET = MMEB_TEXTS.image_alone
"""The text of every target that is an image."""
BARE_IMAGE = f"{IMAGE_PLACEHOLDER}\n"
"""An image without an instruction: a small model trained for minutes learns several times faster from it."""

MetaTask = Literal["classification", "vqa", "retrieval", "grounding"]


def image_query(instruction: str) -> str:
    """The text of a query that has an image."""
    return MMEB_TEXTS.beside_image(instruction)


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One pair of MMEB-train. Image paths are relative to the data set's folder; "" means absent."""

    qry: str
    qry_image_path: str = ""
    pos_text: str
    pos_image_path: str = ""
    neg_text: str = ""
    neg_image_path: str = ""


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One query of MMEB-eval and its candidates: texts and image paths of equal length, index 0 the truth."""

    qry_text: str
    qry_img_path: str = ""
    tgt_text: Sequence[str]
    tgt_img_path: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.tgt_text) != len(self.tgt_img_path) or not self.tgt_text:
            raise ValueError(
                f"{len(self.tgt_text)} candidate texts, {len(self.tgt_img_path)} candidate image paths"
            )


@dataclass(frozen=True, kw_only=True)
class EvalSetInfo:
    """What the evaluator must know of a set that is not in MMEB's own table."""

    meta_task: MetaTask
    in_distribution: bool
    about: str
    """What is in this set."""
    note: str
    """What a reader of its scores must know; printed once beneath them."""


@dataclass(frozen=True, kw_only=True)
class MinimalPair:
    """Two images that differ in one respect, and a statement true of each."""

    pattern: str
    """One of MMVP-VLM's nine types; also a folder name."""
    statements: tuple[str, str]
    images: tuple[Image.Image, Image.Image]


def train_image_path(subset: str, file_name: str) -> str:
    """Where MMEB-train keeps an image of `subset`, relative to the data set's folder."""
    return f"images/{subset}/Train/{file_name}"


def write_train_subset(mmeb: Path, subset: str, rows: Sequence[TrainRow], *, with_negatives: bool) -> None:
    """Write `<mmeb>/<subset>/original-00000-of-00001.parquet`. Some real subsets have no `neg_*` columns."""
    columns = ["qry", "qry_image_path", "pos_text", "pos_image_path"]
    if with_negatives:
        columns += ["neg_text", "neg_image_path"]
    table = pa.table({name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in columns})
    path = mmeb / subset / "original-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_train_index(mmeb: Path, meta_tasks: Mapping[str, MetaTask]) -> None:
    """Write `<mmeb>/meta.json`: {subset: {meta_task}}; an addition of ours, no part of MMEB."""
    _write_json(mmeb / "meta.json", {subset: {"meta_task": task} for subset, task in meta_tasks.items()})


def write_eval_set(mmeb_eval: Path, name: str, rows: Sequence[EvalRow]) -> None:
    """Write `<mmeb_eval>/<name>/test-00000-of-00001.parquet`; image paths are relative to `mmeb_eval`."""
    strings = pa.list_(pa.string())
    table = pa.table(
        {
            "qry_text": pa.array([row.qry_text for row in rows], pa.string()),
            "qry_img_path": pa.array([row.qry_img_path for row in rows], pa.string()),
            "tgt_text": pa.array([list(row.tgt_text) for row in rows], strings),
            "tgt_img_path": pa.array([list(row.tgt_img_path) for row in rows], strings),
        }
    )
    path = mmeb_eval / name / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_eval_index(mmeb_eval: Path, sets: Mapping[str, EvalSetInfo]) -> None:
    """Write `<mmeb_eval>/sets.json`, which is ours: {set: {meta_task, in_distribution, about, note}}."""
    _write_json(mmeb_eval / "sets.json", {name: asdict(info) for name, info in sets.items()})


def write_mmvp(mmvp: Path, pairs: Iterable[MinimalPair]) -> None:
    """Write Questions.csv and the images; rows 2k-1 and 2k, counted from 1, are a pair, odd one first."""
    mmvp.mkdir(parents=True, exist_ok=True)
    with (mmvp / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Question ID", "Type", "Statement"])
        question_id = 0
        for pair in pairs:
            for statement, image in zip(pair.statements, pair.images, strict=True):
                question_id += 1
                writer.writerow([question_id, pair.pattern, statement])
                folder = mmvp / "MLLM_VLM Images" / pair.pattern
                write_file(folder / f"{question_id}.jpg", _jpeg_bytes(image))


def write_file(path: Path, content: bytes) -> None:
    """Write `content`, making the folder when needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second path; a copy where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _jpeg_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
