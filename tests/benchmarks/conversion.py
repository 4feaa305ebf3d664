"""launcher/convert_checkpoint.py, and DeepSpeed's own zero_to_fp32, beside a plain copy of the bytes that are
written. Each has a process of its own, and takes its turn."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from agff.checkpoint import save_checkpoint
from agff.checkpoint_folder import checkpoint_folder, checkpoint_name
from agff.lazy_tensor import of_safetensors
from agff.step import train_step
from launcher.convert_checkpoint import convert
from launcher.quickstart.backbone import BackboneSizes, build_tiny_qwen2vl
from launcher.run.config_file import write_run_config
from tests.benchmarks.memory import ALLOCATOR, peak_bytes, reset_peak
from tests.benchmarks.steps import Setting, engine_of
from tests.benchmarks.synthetic import QUICK_SIZES
from tests.benchmarks.table import Row
from tests.benchmarks.turns import Ratio
from tests.ranks import run_ranks

SIZES = BackboneSizes(num_ranks=49900, hidden=1024, num_layers=22, num_heads=8, intermediate=2816)
"""302 M parameters, 1.2 GB in float32, of which the embedding has 0.2."""


def conversion_rows(*, quick: bool) -> list[Row]:
    """Time and peak memory of both."""
    rounds = 2 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_qwen2vl(folder / "backbone", seed=0, sizes=QUICK_SIZES if quick else SIZES)
        run_ranks(one_step_and_a_checkpoint, folder, world_size=1, timeout_s=600)
        rows = []
        for what, worker in (("convert_checkpoint", ours), ("DeepSpeed's zero_to_fp32", deepspeeds)):
            times, copies, size = run_ranks(_times, worker, folder, rounds, world_size=1, timeout_s=600)[0]
            with _allocator():
                peak, largest = run_ranks(_memory, worker, folder, world_size=1, timeout_s=600)[0]
            note = f"{size / 1e6:,.0f} MB; the copy wrote {size / statistics.median(copies) / 1e9:.1f} GB/s"
            words = {"group": "conversion", "what": what, "case": "", "note": note}
            rows += [
                Row.of(
                    Ratio.of(times, copies), against="copying what it wrote, fsync", quantity="time", **words
                ),
                Row(
                    ratio=peak / largest,
                    against=f"the largest tensor, {largest / 2**20:,.0f} MiB",
                    quantity="memory beyond what was loaded",
                    **words,
                ),
            ]
    return rows


@contextlib.contextmanager
def _allocator() -> Iterator[None]:
    """Freed blocks go back to the system, so that resident bytes are those in use; that takes its time."""
    os.environ |= ALLOCATOR
    try:
        yield
    finally:
        for name in ALLOCATOR:
            del os.environ[name]


def one_step_and_a_checkpoint(folder: Path) -> None:
    """`folder`/run, with a checkpoint of `folder`/backbone after one step under ZeRO-1."""
    setting = Setting(folder=folder / "backbone", num_pairs=2)
    run = dataclasses.replace(setting.run(1, 1), run_dir=folder / "run")
    engine = engine_of(run)
    train_step(engine, run.config.loss, run.config.fusion, setting.batch(run))
    run.run_dir.mkdir()
    write_run_config(run)
    save_checkpoint(engine, run.run_dir, step=1, state={"backbone_sha256": None}, trainable_only=False)


def ours(folder: Path, out: Path) -> None:
    """As the command does, with all its checks."""
    convert(folder / "run", out, dtype=torch.float32)


def deepspeeds(folder: Path, out: Path) -> None:
    """Weights alone, in safetensors, without a check."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    with contextlib.redirect_stdout(io.StringIO()):
        convert_zero_checkpoint_to_fp32_state_dict(
            str(checkpoint_folder(folder / "run")),
            str(out),
            safe_serialization=True,
            tag=checkpoint_name(1),
        )


def _times(
    write: Callable[[Path, Path], None], folder: Path, rounds: int
) -> tuple[list[float], list[float], int]:
    """(seconds of each conversion, of each copy, bytes written)."""
    torch.set_num_threads(2)
    out, times, copies = folder / "out", [], []
    write(folder, out)  # it also imports
    for _ in range(rounds):
        shutil.rmtree(out)
        os.sync()  # nothing of an earlier turn is still on its way to the disk
        start = time.perf_counter()
        write(folder, out)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        _copy(out, folder / "copy")
        copies.append(time.perf_counter() - start)
        shutil.rmtree(folder / "copy")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return times, copies, size


def _memory(write: Callable[[Path, Path], None], folder: Path) -> tuple[int, int]:
    """(bytes that the second conversion, of a process that has loaded what it needs, adds at its peak, bytes
    of the largest tensor)."""
    torch.set_num_threads(2)
    out = folder / "out"
    write(folder, out)
    shutil.rmtree(out)
    before = reset_peak()
    write(folder, out)
    peak = peak_bytes() - before
    tensors = [of_safetensors(path) for path in out.rglob("*.safetensors")]
    largest = max(4 * lazy.shape.numel() for found in tensors for lazy in found.values())
    shutil.rmtree(out)
    return peak, largest


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
