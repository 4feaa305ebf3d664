"""Scenes of 2 to 4 objects, captions that name all or a part of them, and edits that change one thing.

An object is five numbers, one an attribute (ATTRIBUTES); a scene has no two objects in one place. Each pair
of a colour and a shape belongs to one of three splits. Training objects are of the split "train" alone; a
scene of "validation" or "test" has one object of that split among others of "train", and that one is named.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ATTRIBUTES = {"colour": 8, "shape": 8, "size": 3, "orientation": 4, "place": 9}
"""How many values each has."""
MOST_OBJECTS = 4
ABSENT = -1
Split = Literal["train", "validation", "test"]
ALL_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Thing = tuple[int, ...]
"""A value for each of ATTRIBUTES."""

COLOURS = np.array(list(itertools.product((0.0, 1.0), repeat=3)), dtype=np.float32) * 0.7 + 0.3
SHAPES = """
..#.. ##### #.... #...# ##### ##### #...# #....
.###. ..#.. #.... #...# #.... #.... .#.#. #....
##### ..#.. #.... #...# ###.. ##### ..#.. ####.
..#.. ..#.. #.... #...# #.... #.... ..#.. #..#.
..#.. ..#.. ##### ##### #.... ##### ..#.. #..#.
"""
"""Arrow, T, L, U, F, E, Y, h: none is another one turned."""
PATCH_PIXELS = 15
"""A side of a place; the 5 x 5 bitmaps are drawn once, twice or three times as large in its middle."""


@dataclass(frozen=True)
class Scenes:
    """Scenes as one array, each with the caption that names some of its objects."""

    things: np.ndarray
    """(S, MOST_OBJECTS, 5) int64; ABSENT behind the last object."""
    named: np.ndarray
    """(S, MOST_OBJECTS) bool: which objects the caption names."""

    def __len__(self) -> int:
        return len(self.things)

    @property
    def present(self) -> np.ndarray:
        """(S, MOST_OBJECTS) bool."""
        return self.things[:, :, 0] != ABSENT

    def fully_captioned(self) -> Scenes:
        """The same with captions that name every object."""
        return Scenes(self.things, self.present)


def split_of(colour: int, shape: int) -> Split:
    """Of 64 pairs 48 are trained on; each colour and each shape has one pair in either other split."""
    splits: dict[int, Split] = {0: "validation", 4: "test"}
    return splits.get((colour + shape) % ATTRIBUTES["shape"], "train")


def training_batch(rng: random.Random, *, num_scenes: int) -> Scenes:
    """num_scenes scenes, then the same with one attribute of one object changed: each other's hard negatives.

    Half of the captions name every object, the others a part that holds the changed one. No two objects of
    the batch are equal but those that an edit left alone, so no caption fits another scene.
    """
    used: set[Thing] = set()
    originals, edits, named = [], [], []
    for _ in range(num_scenes):
        scene = _scene(rng, [], num_objects=rng.randint(2, MOST_OBJECTS), used=used)
        edit = edited(rng, scene, 0, rng.choice(list(ATTRIBUTES)), used=used)
        num_named = len(scene) if rng.random() < 0.5 else rng.randint(1, len(scene) - 1)
        originals.append(scene)
        edits.append(edit)
        named.append(num_named)
    return _packed(originals + edits, named + named)


def retrieval_pool(rng: random.Random, *, num_scenes: int, num_edits: int, split: Split) -> Scenes:
    """num_scenes scenes whose first object is of that split and is named, then num_edits edits of each, which
    change the named object. No two objects are equal but those that an edit left alone, so of all images one
    fits the caption of a scene, whether it names the first object or all."""
    used: set[Thing] = set()
    scenes, edits = [], []
    for _ in range(num_scenes):
        first = _thing(rng, split, places=range(ATTRIBUTES["place"]), used=used)
        scenes.append(_scene(rng, [first], num_objects=rng.randint(2, MOST_OBJECTS), used=used))
    for scene in scenes:
        for _ in range(num_edits):
            edits.append(edited(rng, scene, 0, rng.choice(list(ATTRIBUTES)), used=used, splits=ALL_SPLITS))
    return _packed(scenes + edits, [1] * len(scenes + edits))


def minimal_pairs(
    rng: random.Random, attribute: str, *, num_pairs: int, split: Split
) -> tuple[Scenes, Scenes]:
    """Scenes as in `retrieval_pool`, and the same with that attribute of the named object changed. By another
    colour or shape the object may leave the split."""
    scenes, edits = [], []
    for _ in range(num_pairs):
        first = _thing(rng, split, places=range(ATTRIBUTES["place"]), used=set())
        scene = _scene(rng, [first], num_objects=rng.randint(2, MOST_OBJECTS), used=set())
        scenes.append(scene)
        edits.append(edited(rng, scene, 0, attribute, used=set(), splits=ALL_SPLITS))
    return _packed(scenes, [1] * num_pairs), _packed(edits, [1] * num_pairs)


def edited(
    rng: random.Random,
    scene: Sequence[Thing],
    index: int,
    attribute: str,
    *,
    used: set[Thing],
    splits: Sequence[Split] = ("train",),
) -> list[Thing]:
    """The scene with another value of that attribute in its object `index`, which is added to `used`; of
    another attribute where no value is left."""
    for name in (attribute, *rng.sample(list(ATTRIBUTES), len(ATTRIBUTES))):
        axis = list(ATTRIBUTES).index(name)
        before = scene[index]
        values = [value for value in range(ATTRIBUTES[name]) if value != before[axis]]
        for value in rng.sample(values, len(values)):
            after = (*before[:axis], value, *before[axis + 1 :])
            is_free = after[-1] not in {thing[-1] for i, thing in enumerate(scene) if i != index}
            if is_free and after not in used and split_of(*after[:2]) in splits:
                used.add(after)
                return [*scene[:index], after, *scene[index + 1 :]]
    raise ValueError("every edit of the object is used; take fewer scenes")


def _scene(rng: random.Random, things: Sequence[Thing], *, num_objects: int, used: set[Thing]) -> list[Thing]:
    """things and as many training objects as are missing, none of them in `used`, to which they are added."""
    scene = list(things)
    while len(scene) < num_objects:
        free = set(range(ATTRIBUTES["place"])) - {thing[-1] for thing in scene}
        scene.append(_thing(rng, "train", places=sorted(free), used=used))
    return scene


def _thing(rng: random.Random, split: Split, *, places: Sequence[int], used: set[Thing]) -> Thing:
    for _ in range(10_000):
        *look, _ = (rng.randrange(count) for count in ATTRIBUTES.values())
        thing = (*look, rng.choice(places))
        if split_of(*thing[:2]) == split and thing not in used:
            used.add(thing)
            return thing
    raise ValueError(f"{len(used)} objects are used; too few are left of split {split}")


def _packed(scenes: Sequence[Sequence[Thing]], num_named: Sequence[int]) -> Scenes:
    things = np.full((len(scenes), MOST_OBJECTS, len(ATTRIBUTES)), ABSENT, dtype=np.int64)
    for row, scene in enumerate(scenes):
        things[row, : len(scene)] = scene
    named = np.arange(MOST_OBJECTS) < np.array(num_named)[:, None]
    return Scenes(things, named)


def looks() -> Tensor:
    """(colours, shapes, sizes, orientations, 3 * PATCH_PIXELS ** 2) float32: every object, drawn."""
    counts = list(ATTRIBUTES.values())[:-1]
    drawn = np.zeros((*counts, 3, PATCH_PIXELS, PATCH_PIXELS), dtype=np.float32)
    for shape, size, turns in itertools.product(*map(range, counts[1:])):
        mask = np.kron(np.rot90(bitmaps()[shape], turns), np.ones((size + 1, size + 1), dtype=np.float32))
        margin = (PATCH_PIXELS - len(mask)) // 2
        inside = slice(margin, margin + len(mask))
        drawn[:, shape, size, turns, :, inside, inside] = COLOURS[:, :, None, None] * mask
    return torch.from_numpy(drawn.reshape(*counts, -1))


def bitmaps() -> np.ndarray:
    """(shapes, 5, 5) float32."""
    rows = [line.split() for line in SHAPES.split("\n") if line]
    return np.array([[[c == "#" for c in row[i]] for row in rows] for i in range(len(rows[0]))], np.float32)
