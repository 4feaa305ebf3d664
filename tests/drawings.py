"""Drawings of our own in the three layouts, and the smallest backbone: what tests use instead of a
network."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from launcher.quickstart.backbone import BackboneSizes, build_tiny_qwen2vl
from launcher.quickstart.layouts import (
    IMAGE_TARGET,
    EvalRow,
    EvalSetInfo,
    MetaTask,
    MinimalPair,
    TrainRow,
    image_query,
    train_image_path,
    write_eval_index,
    write_eval_set,
    write_file,
    write_mmvp,
    write_train_index,
    write_train_subset,
)
from launcher.quickstart.render import png_bytes

SIZE_PX = 56
COLORS = ("red", "green", "blue", "orange", "purple", "black")
FORMS = ("circle", "square", "triangle", "letter A", "letter B")
COUNTS = ("one", "two", "three")
PLACES = ("top", "bottom")

TINY_SIZES = BackboneSizes(
    num_ranks=498,
    hidden=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate=64,
    vision_hidden=32,
    vision_layers=2,
    vision_heads=2,
)
"""119 thousand parameters, 512 tokens."""


@dataclass(frozen=True, kw_only=True)
class DrawingPaths:
    """The three layouts."""

    mmeb: Path
    mmeb_eval: Path
    mmvp: Path


@dataclass(frozen=True, kw_only=True)
class Scene:
    """So many forms of one colour in a row at the top or bottom."""

    count: str
    color: str
    form: str
    place: str

    @property
    def text(self) -> str:
        return f"{self.count} {self.color} {self.form} {self.place}"

    @property
    def file_name(self) -> str:
        """Holds spaces, as some of MMEB's do."""
        return f"{self.text}.png"

    def draw(self) -> Image.Image:
        image = Image.new("RGB", (SIZE_PX, SIZE_PX), "white")
        canvas = ImageDraw.Draw(image)
        top = 6 if self.place == "top" else 36
        for index in range(COUNTS.index(self.count) + 1):
            _draw_form(canvas, self.form, 2 + 18 * index, top, self.color)
        return image


def write_drawings(folder: Path, *, num_images: int = 24, seed: int = 0) -> DrawingPaths:
    """Four training subsets, three evaluation sets and three patterns of pairs over `num_images` distinct
    scenes.

    Shapes_text has no image at all, so a batch of it has none either; Shapes_t2i has hard negatives; every
    image of Shapes_VQA is used by four rows.
    """
    scenes = all_scenes()
    random.Random(seed).shuffle(scenes)
    scenes = scenes[:num_images]
    paths = DrawingPaths(mmeb=folder / "mmeb", mmeb_eval=folder / "mmeb_eval", mmvp=folder / "mmvp")
    _write_train(paths.mmeb, scenes)
    _write_eval(paths.mmeb_eval, scenes)
    write_mmvp(paths.mmvp, minimal_pairs(scenes))
    return paths


def all_scenes() -> list[Scene]:
    """Every combination, in a fixed order."""
    return [
        Scene(count=count, color=color, form=form, place=place)
        for count, color, form, place in itertools.product(COUNTS, COLORS, FORMS, PLACES)
    ]


def tiny_backbone(folder: Path, *, seed: int = 0) -> Path:
    """The smallest Qwen2-VL, as an ordinary Hugging Face folder; returns `folder`."""
    build_tiny_qwen2vl(folder, seed=seed, sizes=TINY_SIZES)
    return folder


def minimal_pairs(scenes: Sequence[Scene], *, pairs_per_pattern: int = 3) -> list[MinimalPair]:
    """Pairs of scenes that differ in colour, in count, in place."""
    return [
        _pair(pattern, scene, changed)
        for pattern, change in (
            ("Color and Appearance", lambda s: _replace(s, color=_next(COLORS, s.color))),
            ("Quantity and Count", lambda s: _replace(s, count=_next(COUNTS, s.count))),
            ("Positional and Relational Context", lambda s: _replace(s, place=_next(PLACES, s.place))),
        )
        for scene in scenes[:pairs_per_pattern]
        for changed in [change(scene)]
    ]


def questions(scene: Scene) -> list[tuple[str, str]]:
    """(question, answer) pairs."""
    return [
        ("What color?", scene.color),
        ("How many?", scene.count),
        ("What shape?", scene.form),
        ("Where?", scene.place),
    ]


def _write_train(mmeb: Path, scenes: Sequence[Scene]) -> None:
    path_of = {
        subset: [train_image_path(subset, scene.file_name) for scene in scenes] for subset in _IMAGE_SUBSETS
    }
    for paths in path_of.values():
        for scene, path in zip(scenes, paths, strict=True):
            write_file(mmeb / path, png_bytes(scene.draw()))
    t2i, i2t, vqa = (path_of[subset] for subset in _IMAGE_SUBSETS)
    rows = [
        TrainRow(
            qry=f"Find a photo of {scene.text}\n",
            pos_text=IMAGE_TARGET,
            pos_image_path=t2i[i],
            neg_text=IMAGE_TARGET,
            neg_image_path=t2i[i - 1],
        )
        for i, scene in enumerate(scenes)
    ]
    write_train_subset(mmeb, "Shapes_t2i", rows, with_negatives=True)
    rows = [
        TrainRow(qry=image_query("Name it."), qry_image_path=path, pos_text=scene.text)
        for scene, path in zip(scenes, i2t, strict=True)
    ]
    write_train_subset(mmeb, "Shapes_i2t", rows, with_negatives=False)
    rows = [
        TrainRow(qry=image_query(question), qry_image_path=path, pos_text=answer)
        for scene, path in zip(scenes, vqa, strict=True)
        for question, answer in questions(scene)
    ]
    write_train_subset(mmeb, "Shapes_VQA", rows, with_negatives=False)
    rows = [TrainRow(qry=f"Say it again: {scene.text}\n", pos_text=_reworded(scene)) for scene in scenes]
    write_train_subset(mmeb, "Shapes_text", rows, with_negatives=False)
    write_train_index(
        mmeb,
        {
            "Shapes_t2i": "retrieval",
            "Shapes_i2t": "retrieval",
            "Shapes_VQA": "vqa",
            "Shapes_text": "retrieval",
        },
    )


_IMAGE_SUBSETS = ("Shapes_t2i", "Shapes_i2t", "Shapes_VQA")


def _write_eval(mmeb_eval: Path, scenes: Sequence[Scene]) -> None:
    paths = [f"images/Shapes/{scene.file_name}" for scene in scenes]
    for scene, path in zip(scenes, paths, strict=True):
        write_file(mmeb_eval / path, png_bytes(scene.draw()))
    names = [scene.text for scene in scenes]
    t2i = [
        EvalRow(
            qry_text=f"Find a photo of {scene.text}\n",
            tgt_text=[IMAGE_TARGET] * len(paths),
            tgt_img_path=_first(paths, i),
        )
        for i, scene in enumerate(scenes)
    ]
    i2t = [_text_row(paths[i], "Name it.", _first(names, i)) for i in range(len(scenes))]
    colors = list(COLORS)
    vqa = [
        _text_row(path, "What color?", _first(colors, colors.index(scene.color)))
        for scene, path in zip(scenes, paths, strict=True)
    ]
    for name, rows in (("Shapes_t2i-eval", t2i), ("Shapes_i2t-eval", i2t), ("Shapes_VQA-eval", vqa)):
        write_eval_set(mmeb_eval, name, rows)
    write_eval_index(
        mmeb_eval,
        {
            "Shapes_t2i-eval": _info("retrieval", in_distribution=True),
            "Shapes_i2t-eval": _info("retrieval", in_distribution=False),
            "Shapes_VQA-eval": _info("vqa", in_distribution=True),
        },
    )


def _info(meta_task: MetaTask, *, in_distribution: bool) -> EvalSetInfo:
    return EvalSetInfo(
        meta_task=meta_task,
        in_distribution=in_distribution,
        about="drawings of our own",
        note="drawings made for tests; their scores mean nothing.",
    )


def _text_row(path: str, instruction: str, candidates: list[str]) -> EvalRow:
    return EvalRow(
        qry_text=image_query(instruction),
        qry_img_path=path,
        tgt_text=candidates,
        tgt_img_path=[""] * len(candidates),
    )


def _first(values: Sequence[str], index: int) -> list[str]:
    return [values[index], *values[:index], *values[index + 1 :]]


def _reworded(scene: Scene) -> str:
    return f"{scene.form} in {scene.color}, {scene.count} at the {scene.place}"


def _draw_form(canvas: ImageDraw.ImageDraw, form: str, left: int, top: int, color: str) -> None:
    right, bottom = left + 14, top + 14
    match form:
        case "circle":
            canvas.ellipse((left, top, right, bottom), fill=color)
        case "square":
            canvas.rectangle((left, top, right, bottom), fill=color)
        case "triangle":
            canvas.polygon(((left, bottom), (right, bottom), (left + 7, top)), fill=color)
        case _:
            canvas.text((left + 2, top - 2), form[-1], fill=color, font_size=18)


def _pair(pattern: str, first: Scene, second: Scene) -> MinimalPair:
    return MinimalPair(
        pattern=pattern, statements=(first.text, second.text), images=(first.draw(), second.draw())
    )


def _replace(scene: Scene, **changes: str) -> Scene:
    return Scene(**{**vars(scene), **changes})


def _next(values: Sequence[str], value: str) -> str:
    return values[(values.index(value) + 1) % len(values)]
