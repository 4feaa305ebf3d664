"""launcher/convert_checkpoint.py beside a plain copy of the bytes that it writes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from agff.checkpoint import save_checkpoint
from agff.step import train_step
from launcher.convert_checkpoint import convert
from launcher.quickstart.backbone import BackboneSizes, build_tiny_qwen2vl
from launcher.run.config_file import write_run_config
from tests.benchmarks.memory import peak_bytes, reset_peak
from tests.benchmarks.steps import Setting, engine_of
from tests.benchmarks.synthetic import QUICK_SIZES
from tests.benchmarks.table import Row
from tests.benchmarks.turns import Ratio
from tests.ranks import run_ranks

SIZES = BackboneSizes(hidden=1024, num_layers=6, num_heads=8, intermediate=2816)
"""77 M parameters, 310 MB in float32."""


def conversion_rows(*, quick: bool) -> list[Row]:
    """Time and peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_qwen2vl(folder / "backbone", seed=0, sizes=QUICK_SIZES if quick else SIZES)
        run_ranks(one_step_and_a_checkpoint, folder, world_size=1)
        times, copies, peak, size = run_ranks(convert_and_copy, folder, 2 if quick else 5, world_size=1)[0]
    words = {"group": "conversion", "what": "convert_checkpoint", "case": "", "note": f"{size / 1e6:.0f} MB"}
    return [
        Row.of(Ratio.of(times, copies), against="copying the release, fsync", quantity="time", **words),
        Row(
            ratio=peak / size,
            against="the release's bytes",
            quantity="memory beyond what was loaded",
            **words,
        ),
    ]


def one_step_and_a_checkpoint(folder: Path) -> None:
    """`folder`/run, with a checkpoint of `folder`/backbone after one step under ZeRO-1."""
    setting = Setting(folder=folder / "backbone", num_pairs=2)
    run = dataclasses.replace(setting.run(1, 1), run_dir=folder / "run")
    engine = engine_of(run)
    train_step(engine, run.config.loss, run.config.fusion, setting.batch(run))
    run.run_dir.mkdir()
    write_run_config(run)
    save_checkpoint(engine, run.run_dir, step=1, state={"backbone_sha256": None}, trainable_only=False)


def convert_and_copy(folder: Path, rounds: int) -> tuple[list[float], list[float], int, int]:
    """(seconds of each conversion, of each copy, bytes that the first, which is not timed, needs beyond the
    resident ones, bytes of the release)."""
    torch.set_num_threads(2)
    release = folder / "release"
    before = reset_peak()
    convert(folder / "run", release, dtype=torch.float32)
    peak = peak_bytes() - before
    times, copies = [], []
    for _ in range(rounds):
        shutil.rmtree(release)
        os.sync()  # nothing of an earlier turn is still on its way to the disk
        start = time.perf_counter()
        convert(folder / "run", release, dtype=torch.float32)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        _copy(release, folder / "copy")
        copies.append(time.perf_counter() - start)
        shutil.rmtree(folder / "copy")
    return times, copies, peak, sum(path.stat().st_size for path in release.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
