"""Encoding the items of an evaluation beside the bare model on inputs that were prepared before.

Decoding has cores of its own: the model computes on one thread less than there are cores, and that core
loads. Both sides make the same batches; they take turns in one process.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from agff.backbone import load_backbone
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.similarity import FusionConfig
from data_pipeline.layouts.eval_items import EvalItem
from launcher.encoding.items import batches_by_length, encode_items
from launcher.encoding.loading import load_batch
from tests.benchmarks.synthetic import PROMPTS, processor_of
from tests.benchmarks.table import Row
from tests.benchmarks.turns import Ratio

BATCH_SIZE = 32


def evaluation_rows(folder: Path, *, quick: bool) -> list[Row]:
    """folder: of the backbone. One row: items/s of the bare model / those of an evaluation."""
    num_workers, rounds, num_items = 1, 1 if quick else 9, 16 if quick else 512
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - num_workers))
    try:
        with tempfile.TemporaryDirectory() as name:
            items = _items(Path(name), num_items)
            model = _model(folder)
            batches = batches_by_length(model, items, range(num_items), batch_size=BATCH_SIZE)
            prepared = [load_batch(model.processor, items, batch).inputs for batch in batches]

            def evaluation() -> None:
                encode_items(model, items, batch_size=BATCH_SIZE, title="items", num_workers=num_workers)

            def bare() -> None:
                for inputs in prepared:
                    model.encode_inputs(inputs)

            times = [(_seconds(evaluation), _seconds(bare)) for _ in range(rounds + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    ours, others = ([pair[side] for pair in times] for side in (0, 1))
    return [
        Row.of(
            Ratio.of(ours, others),
            group="evaluation",
            what="items of an evaluation: looked at, decoded, encoded",
            case=f"{num_items} items, images of 224 px and texts, {num_workers} core that decodes",
            against="the bare model on prepared inputs",
            quantity="time",
            note=f"{num_items / min(ours):,.0f} items/s; at most 1.1 is wanted",
        )
    ]


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _model(folder: Path) -> Embedder:
    torch.manual_seed(0)
    model = EmbeddingModel(load_backbone(folder, dtype=torch.float32, attention="sdpa"), PROMPTS)
    return Embedder(model, processor_of(folder), FusionConfig())


def _items(folder: Path, count: int) -> list[EvalItem]:
    """JPEGs of smooth noise, and every fourth item a text."""
    generator = np.random.default_rng(0)
    items = []
    for number in range(count):
        if number % 4 == 3:
            items.append(
                EvalItem(f"picture {number} of something that is " + "very " * (number % 9) + "small")
            )
            continue
        coarse = Image.fromarray(generator.integers(0, 256, size=(14, 14, 3), dtype=np.uint8))
        path = folder / f"{number}.jpg"
        coarse.resize((224, 224), Image.Resampling.BICUBIC).save(path)
        items.append(EvalItem("<|image_1|>\nRepresent the given image.\n", path))
    return items
