"""The work of one rank: blocks of samples -> the teacher's vectors of both sides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agff.batch import Item
from agff.errors import ConfigError, DataError
from data_pipeline.decode import Example, decode
from data_pipeline.reader import RawSample, ShardReader
from data_pipeline.vectors import SIDES
from data_pipeline.vectors_writer import Block, LeftOut, VectorsWriter
from launcher.embedding.teacher import Teacher

GROUP = 128
"""Samples that are decoded at once. A part of a block, whatever rank has it: which texts share a batch, and
with it the rounding, does not depend on the number of ranks."""


def refuse_images(teacher: Teacher, reader: ShardReader, sources: Iterable[str]) -> None:
    """Look at the first sample of each source before hours of work. Raises ConfigError."""
    for source in sources:
        with contextlib.suppress(DataError):  # a damaged sample, or none at all
            _refuse_images(teacher, source, reader.read(source, 0))


def write_blocks(
    teacher: Teacher,
    reader: ShardReader,
    writer: VectorsWriter,
    blocks: Iterable[Block],
    *,
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    """Write each block, and with it what the teacher could not take: such a side's vectors are zero, and
    training leaves the sample out.

    progress: called with the number of samples that are done. Raises ConfigError for an image that the
    teacher cannot see, DataError for a vector that is not finite.
    """
    for block in blocks:
        vectors_N2E = np.zeros((block.stop - block.start, SIDES, teacher.dim), dtype=np.float32)
        unusable: list[str] = []
        num_cut = 0
        for start in range(block.start, block.stop, GROUP):
            samples = range(start, min(start + GROUP, block.stop))
            examples: dict[int, Example] = {}
            for sample in samples:
                try:
                    examples[sample - block.start] = _example(teacher, reader, block.source, sample)
                except DataError as error:
                    unusable.append(str(error))
            unusable += _encode(teacher, examples, vectors_N2E, batch_size=batch_size)
            num_cut += teacher.num_cut([x for each in examples.values() for x in (each.query, each.target)])
            progress(len(samples))
        writer.write(block, vectors_N2E, LeftOut(unusable=tuple(unusable), num_cut=num_cut))


def _example(teacher: Teacher, reader: ShardReader, source: str, sample: int) -> Example:
    raw = reader.read(source, sample)
    _refuse_images(teacher, source, raw)
    return decode(raw, source=source, with_negatives=False, seen_pixels=teacher.seen_pixels)


def _refuse_images(teacher: Teacher, source: str, raw: RawSample) -> None:
    sides = [side for side in ("query", "target") if side in raw.images]
    if teacher.seen_pixels is None and sides:
        raise ConfigError(
            f"{raw.address}: the {' and the '.join(sides)} of source {source} has an image, and the teacher "
            "embeds texts alone; name the sources of texts (--sources), or a release of ours as the teacher"
        )


def _encode(
    teacher: Teacher, examples: dict[int, Example], vectors_N2E: NDArray[np.float32], *, batch_size: int
) -> list[str]:
    """Fill in the examples' vectors, equal items encoded once and in the order of their lengths; the items
    that the teacher refuses."""
    places: dict[int, list[tuple[int, int]]] = {}
    items: dict[int, Item] = {}
    for row, example in examples.items():
        for side, (content_id, item) in enumerate(
            ((example.query_id, example.query), (example.target_id, example.target))
        ):
            places.setdefault(content_id, []).append((row, side))
            items.setdefault(content_id, item)
    order = sorted(items, key=lambda content_id: (len(items[content_id].text), content_id))
    refused: list[str] = []
    vectors = encode_or_errors(teacher.encode, [items[each] for each in order], batch_size=batch_size)
    for content_id, vector in zip(order, vectors, strict=True):
        if isinstance(vector, DataError):
            refused.append(str(vector))
            continue
        for row, side in places[content_id]:
            vectors_N2E[row, side] = vector
    return refused


class Encodes(Protocol):
    """A model's encoder."""

    def __call__(self, items: Sequence[Item], *, batch_size: int) -> NDArray[np.float32]:
        """(N, ...) vectors. Raises DataError for an item that it cannot represent."""


def encode_or_errors(
    encode: Encodes, items: Sequence[Item], *, batch_size: int
) -> list[NDArray[np.float32] | DataError]:
    """Of each item what the model makes of it, or why it cannot. `batch_size` items in their order share a
    batch; one with an item that is refused is encoded item by item."""
    found: list[NDArray[np.float32] | DataError] = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        try:
            found += list(encode(batch, batch_size=batch_size))
        except DataError as error:
            found += [error] if len(batch) == 1 else encode_or_errors(encode, batch, batch_size=1)
    return found
