"""How a rank's peak grows with the global batch at a fixed chunk: beside what has to be there."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

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


def memory_rows(folder: Path, *, quick: bool) -> list[Row]:
    """Growth of the peak over that of the smallest batch / growth of the held inputs and of one (B, C)
    matrix."""
    smallest, *larger = (CHUNK_ROWS, 2 * CHUNK_ROWS) if quick else (64, 256, 1024, 4096)
    peak, inputs, width = measure_apart(folder, smallest)
    rows = []
    for num_pairs in larger:
        its_peak, its_inputs, _ = measure_apart(folder, num_pairs)
        matrix = FLOAT_BYTES * (num_pairs**2 - smallest**2)
        embeddings = FLOAT_BYTES * 2 * (num_pairs - smallest) * PROMPTS.num_vectors * width
        rows.append(
            Row(
                group="memory",
                what=f"growth of a rank's peak from {smallest} pairs on, chunks of {CHUNK_ROWS} items",
                case=f"{num_pairs:,} pairs",
                against="held inputs + one (B, C) matrix",
                quantity="resident memory",
                ratio=(its_peak - peak) / (its_inputs - inputs + matrix),
                note=f"peak {_mib(peak)} -> {_mib(its_peak)} MiB; inputs {_mib(its_inputs - inputs)}, matrix "
                f"{_mib(matrix)}, the embeddings beside them {_mib(embeddings)}",
            )
        )
    return rows


def measure_apart(folder: Path, num_pairs: int) -> tuple[int, int, int]:
    """(peak of resident bytes in one step, bytes of its inputs, D), in a process of its own."""
    return run_ranks(peak_of_a_step, folder, num_pairs, world_size=1, timeout_s=600)[0]


def peak_of_a_step(folder: Path, num_pairs: int) -> tuple[int, int, int]:
    """Of one rank under ZeRO-1, after a step of the smallest batch."""
    torch.set_num_threads(2)
    run = Setting(folder=folder, num_pairs=num_pairs).run(1, 2 * num_pairs // CHUNK_ROWS)
    engine = engine_of(run)
    step = partial(train_step, engine, run.config.loss, run.config.fusion)
    process = processor_of(folder)
    batch = collate(examples(num_pairs), process, chunking=FixedRows(rows=CHUNK_ROWS))
    step(collate(examples(CHUNK_ROWS), process, chunking=FixedRows(rows=CHUNK_ROWS)))
    examples.cache_clear()  # the pictures themselves are no inputs
    gc.collect()
    dist.barrier()
    reset_peak()
    step(batch)
    return peak_bytes(), _bytes_of(batch), engine.model.prompted_embedding.vectors.shape[1]


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
