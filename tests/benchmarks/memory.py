"""How a rank's peak grows with the global batch at a fixed chunk: beside what has to be there.

All items are alike, so that every chunk of every batch needs the same working memory, and both passes encode
one chunk at once. Large blocks go back to the system when they are freed: the resident bytes are then those
in use, without what malloc keeps for later.
"""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from agff.batch import Batch
from agff.step import train_step
from data_pipeline.collate import FixedRows, collate
from tests.benchmarks.steps import Setting, engine_of
from tests.benchmarks.synthetic import PROMPTS, examples, processor_of
from tests.benchmarks.table import Row
from tests.ranks import run_ranks

CHUNK_ROWS = 64
FLOAT_BYTES = 4
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Of glibc, for the processes that are measured."""


def memory_rows(folder: Path, *, quick: bool) -> list[Row]:
    """Growth of the peak over that of the smallest batch / growth of what is held for each item and of one
    (B, C) matrix."""
    smallest, *larger = (CHUNK_ROWS, 2 * CHUNK_ROWS) if quick else (64, 256, 1024, 4096)
    smallest_added, smallest_inputs, width = measure_apart(folder, smallest)
    rows = []
    for num_pairs in larger:
        its_added, its_inputs, _ = measure_apart(folder, num_pairs)
        inputs, added = its_inputs - smallest_inputs, its_added - smallest_added
        matrix = FLOAT_BYTES * (num_pairs**2 - smallest**2)
        embeddings = FLOAT_BYTES * 2 * (num_pairs - smallest) * PROMPTS.num_vectors * width
        rows.append(
            Row(
                group="memory",
                what=f"growth of a rank's peak from {smallest} pairs on, chunks of {CHUNK_ROWS} items",
                case=f"{num_pairs:,} pairs",
                against="held inputs, embeddings and their gradient, one (B, C) matrix",
                quantity="resident memory",
                ratio=(inputs + added) / (inputs + 2 * embeddings + matrix),
                note=f"inputs {_mib(inputs)} MiB, and a step adds {_mib(smallest_added)} -> "
                f"{_mib(its_added)}; matrix {_mib(matrix)}, embeddings {_mib(embeddings)}",
            )
        )
    return rows


def measure_apart(folder: Path, num_pairs: int) -> tuple[int, int, int]:
    """(bytes that one step adds at its peak to what is resident before it, bytes of its inputs, D), in a
    process of its own."""
    with mock.patch.dict(os.environ, ALLOCATOR):
        return run_ranks(peak_of_a_step, folder, num_pairs, world_size=1, timeout_s=600)[0]


def peak_of_a_step(folder: Path, num_pairs: int) -> tuple[int, int, int]:
    """Of one rank under ZeRO-1, after a step of the smallest batch."""
    torch.set_num_threads(2)
    setting = Setting(folder=folder, num_pairs=num_pairs, first_pass_chunks=1)
    run = setting.run(1, 2 * num_pairs // CHUNK_ROWS)
    engine = engine_of(run)
    step = partial(train_step, engine, run.config.loss, run.config.fusion)
    process = processor_of(folder)
    small, batch = (
        collate(examples(number, are_alike=True), process, chunking=FixedRows(rows=CHUNK_ROWS))
        for number in (CHUNK_ROWS, num_pairs)
    )
    step(small)
    examples.cache_clear()  # the pictures themselves are no inputs
    gc.collect()
    dist.barrier()
    before = reset_peak()
    step(batch)
    return peak_bytes() - before, _bytes_of(batch), engine.model.prompted_embedding.vectors.shape[1]


def reset_peak() -> int:
    """Bytes that are resident now, from which the peak counts (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most bytes that were resident at once since `reset_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _bytes_of(batch: Batch) -> int:
    return sum(tensor.nbytes for chunk in batch.chunks for tensor in chunk.values())


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"
