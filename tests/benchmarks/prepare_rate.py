"""`python tests/benchmarks/prepare_rate.py`: data_pipeline.convert.prepare against `tar cf` of the same image
files.

Both read loose files that were read once before, so from the page cache, and write to the same disk. Ours
also reads the image headers, hashes each image and each shard, writes the index, and forces every shard to
disk (fsync); tar leaves its bytes in the page cache, so a second line has the time with `sync` of what it
wrote. Runs take turns; the best of --repeats counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.convert import prepare
from launcher.quickstart.layouts import (
    TrainRow,
    image_query,
    train_image_path,
    write_file,
    write_train_subset,
)

SUBSET = "Noise"


def make_images(mmeb: Path, num_images: int, *, seed: int = 0) -> int:
    """An MMEB-train layout of noise JPEGs of about 50 to 100 kB, each of one row; their bytes in all."""
    generator = np.random.default_rng(seed)
    total = 0
    rows = []
    for number in range(num_images):
        side = int(generator.integers(270, 380))
        coarse = generator.integers(0, 256, size=(side // 2, side // 2, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=92)
        path = train_image_path(SUBSET, f"{number:06d}.jpg")
        write_file(mmeb / path, buffer.getvalue())
        total += buffer.tell()
        rows.append(TrainRow(qry=image_query("Name it."), qry_image_path=path, pos_text=f"noise {number}"))
    write_train_subset(mmeb, SUBSET, rows, with_negatives=False)
    return total


def read_once(folder: Path) -> None:
    """Bring every file into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def tar(images: Path, out: Path, parts: int, *, sync: bool) -> None:
    """`tar cf` of the image files, in `parts` processes at once, each with its own share and its own tar
    file."""
    names = sorted(path.name for path in images.iterdir())
    running = []
    for part in range(parts):
        listed = out / f"{part}.txt"
        listed.write_text("\n".join(names[part::parts]))
        running.append(
            subprocess.Popen(["tar", "cf", str(out / f"{part}.tar"), "-C", str(images), "-T", str(listed)])
        )
    for process in running:
        if process.wait():
            raise RuntimeError(f"tar ended with {process.returncode}")
    if sync:
        subprocess.run(["sync", *map(str, out.glob("*.tar"))], check=True)


def best_times(methods: dict[str, Callable[[Path], object]], folder: Path, repeats: int) -> dict[str, float]:
    """Best wall time of each; they take turns, each run writes into a new folder that is removed
    afterwards."""
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(repeats):
        for name, run in methods.items():
            out = folder / "out"
            out.mkdir()
            os.sync()  # nothing of an earlier run is still on its way to the disk
            start = time.perf_counter()
            run(out)
            best[name] = min(best[name], time.perf_counter() - start)
            shutil.rmtree(out)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="JPEG files (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="writers of prepare (default: %(default)s)")
    parser.add_argument(
        "--rows_per_shard", type=int, default=250, help="rows of one tar file (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        mmeb = folder / "mmeb"
        images = mmeb / "images" / SUBSET / "Train"
        size = make_images(mmeb, arguments.images)
        read_once(mmeb)

        def ours(out: Path, processes: int) -> None:
            pool = None if processes == 1 else (lambda: ProcessPoolExecutor(processes))
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                manifest = prepare(mmeb, out, rows_per_shard=arguments.rows_per_shard, executor=pool)
            written = sum(source.num_samples for source in manifest.sources.values())
            if written != arguments.images:
                raise RuntimeError(f"{written} of {arguments.images} rows were written")

        several = arguments.processes
        methods: dict[str, Callable[[Path], object]] = {
            "tar cf": lambda out: tar(images, out, 1, sync=False),
            "tar cf, then sync": lambda out: tar(images, out, 1, sync=True),
            f"{several} x tar cf, then sync": lambda out: tar(images, out, several, sync=True),
            "prepare, 1 process": lambda out: ours(out, 1),
            f"prepare, {several} processes": lambda out: ours(out, several),
        }
        times = best_times(methods, folder, arguments.repeats)
    sys.stdout.write(
        f"{platform.machine()}, {os.cpu_count()} CPUs; "
        f"{arguments.images:,} JPEGs of {size / arguments.images / 1e3:.0f} kB, {size / 1e6:.0f} MB, "
        f"best of {arguments.repeats}\n"
        f"{'':<26}{'s':>8}{'images/s':>11}{'MB/s':>8}{'of tar cf':>11}{'of tar cf + sync':>18}\n"
    )
    for name, seconds in times.items():
        sys.stdout.write(
            f"{name:<26}{seconds:>8.3f}{arguments.images / seconds:>11,.0f}{size / 1e6 / seconds:>8.0f}"
            f"{times['tar cf'] / seconds:>10.2f}x{times['tar cf, then sync'] / seconds:>17.2f}x\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
