"""A sample of regions in a shard: one image and what is said of its parts, of which training draws one.

{"query": {"text", "instruction", "image", "id"}, "size": [width, height],
 "regions": [{"box": [x0, y0, x1, y1], "id", "text", "text_id"}, ...]}

Boxes are in pixels of the upright image, `id` is the content id of text, image and box, `text_id` that of the
phrase: equal phrases are no negatives of each other, whatever image they are of.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from agff.errors import DataError
from data_pipeline.boxes import Box, box_problem, cut_box
from data_pipeline.layouts.training_rows import RegionRow
from data_pipeline.reader import roles_of


def content_id(text: str, image: bytes | None, box: Box | None = None) -> int:
    """63-bit id of an item's content; equal ids mean equal text, image bytes and region."""
    return id_of_digest(text, hashlib.sha256(image).digest() if image is not None else None, box)


def id_of_digest(text: str, image_digest: bytes | None, box: Box | None = None) -> int:
    """The same of an image's SHA-256."""
    content = text.encode() + b"\0" + (image_digest or b"") + (struct.pack("<4d", *box) if box else b"")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def region_fields(
    row: RegionRow, text: str, image_digest: bytes, size: tuple[int, int]
) -> tuple[dict[str, Any], list[str]]:
    """What the record of the image says of its regions, and why others were left out.

    text: of the image. size: of the image, upright. Raises DataError when no region can be used, or the boxes
    are of an image of another size.
    """
    if row.size is not None and row.size != size:
        raise DataError(
            f"image {row.image_name}: has {size[0]} x {size[1]} pixels, its boxes are of one of "
            f"{row.size[0]} x {row.size[1]}; they must be in pixels of the upright image"
        )
    used, left_out = [], []
    for region in row.regions:
        if isinstance(region, str):
            left_out.append(region)
        elif problem := box_problem(region.box, size):
            left_out.append(f"{problem} ({region.phrase[:60]!r})")
        else:
            box = cut_box(region.box, size)
            ids = {"id": id_of_digest(text, image_digest, box), "text_id": id_of_digest(region.phrase, None)}
            used.append({"box": list(box), "text": region.phrase, **ids})
    if not used:
        raise DataError(
            f"image {row.image_name}: no region can be used: {'; '.join(left_out) or 'there is none'}"
        )
    return {"size": list(size), "regions": used}, left_out


def sides_of(record: Mapping[str, Any], draw: Callable[[int], int]) -> dict[str, Mapping[str, Any]]:
    """The sides of a sample by role, as a pair has them.

    draw: the number of a sample's regions -> the one that is taken.
    """
    if "regions" not in record:
        return {role: record[role] for role in roles_of(record)}
    region = record["regions"][draw(len(record["regions"]))]
    query = {**record["query"], "box": region["box"], "size": record["size"], "id": region["id"]}
    return {"query": query, "target": {"text": region["text"], "image": None, "id": region["text_id"]}}


def first_region(count: int) -> int:
    """A draw for those to whom any region is as good."""
    return 0


def all_sides(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(role, side) of everything that may be drawn of a sample."""
    if "regions" not in record:
        yield from sides_of(record, first_region).items()
        return
    for region in record["regions"]:
        yield from sides_of({**record, "regions": [region]}, first_region).items()


def scaled_box(side: Mapping[str, Any], image_size: tuple[int, int]) -> Box | None:
    """The side's box in pixels of the decoded image, which may be smaller than the stored one. Raises
    ValueError for one that is no part of it."""
    if "box" not in side:
        return None
    (x0, y0, x1, y1), (width, height) = map(float, side["box"]), map(int, side["size"])
    if problem := box_problem((x0, y0, x1, y1), (width, height)):
        raise ValueError(problem)
    x, y = image_size[0] / width, image_size[1] / height
    return x0 * x, y0 * y, x1 * x, y1 * y
