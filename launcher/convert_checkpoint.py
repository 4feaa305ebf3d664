"""`python launcher/convert_checkpoint.py RUN OUT`: the newest ZeRO checkpoint of a run -> a release folder.

Tensor by tensor: any machine with room for two of the model's largest tensors converts it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError

from agff.adapter_folder import hub_name
from agff.errors import AgffError, CheckpointError
from agff.files import partial_path, sync
from agff.lazy_tensor import damaged_records
from agff.release_check import check_golden_streamed
from agff.release_weights import check_written
from agff.release_writer import Lora, save_release
from launcher.command_line import report
from launcher.run.config_file import read_run_config
from launcher.run.origin import origin_of
from launcher.run.trained_model import damaged, open_run, step_of

SYNC_EVERY_S = 0.2
"""Of the weights that are being written, so that the disk works from the first of them on."""


def convert(
    run: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    step: int | None = None,
    lora: Lora = "merged",
    shard_bytes: int | None = None,
    universal: Path | None = None,
    base_model: str | None = None,
) -> float:
    """Write the release of a checkpoint (without `step`: the newest) tensor by tensor and prove it: read each
    tensor back and compare its hash, and compare the vectors of what was written with the checkpoint's;
    return their smallest cosine.

    The model is never in memory. Two of its largest tensors are at most: one in the number format of the
    checkpoint and its copy in that of the release, or its adapter's product. For both vectors it computes
    with one module's weights at a time (agff/streamed_model.py).

    Raises CheckpointError when OUT exists or cannot be written, which is tried before anything is read, when
    there is no such checkpoint or it cannot be loaded, or when what was read back is not what was written.
    Then nothing is left of it.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder or remove it")
    partial = partial_path(out)
    with _named_errors(out):
        partial.mkdir(parents=True)
    try:
        trained = open_run(run, step=step, universal=universal)
        known = trained.step if universal is None else step_of(run, None)
        origin = origin_of(run, read_run_config(run), known) | {"step": trained.step}
        if base_model := base_model or hub_name(trained.backbone):
            origin["base_model"] = base_model
        with ThreadPoolExecutor(2) as pool, _named_errors(out):
            damage = pool.submit(damaged_records, trained.pieces)  # while the same bytes are copied
            with _syncing(partial, pool):
                written = save_release(
                    trained.embedder,
                    partial,
                    origin=origin,
                    dtype=dtype,
                    weights=trained.weights,
                    lora=lora,
                    base_model=base_model,
                    shard_bytes=shard_bytes,
                )
            on_disk = pool.submit(_sync, partial)  # while it is read back
            if problems := damage.result():
                raise CheckpointError(damaged(run, trained.step, problems))
            for each in written:
                check_written(each)
            cosine = check_golden_streamed(partial, base=trained.backbone)
            on_disk.result()
            _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return cosine


@contextlib.contextmanager
def _syncing(folder: Path, pool: ThreadPoolExecutor) -> Iterator[None]:
    """In here the weights that `folder` has by now go to the disk while others are read and written."""
    over = threading.Event()

    def keep_syncing() -> None:
        while not over.wait(SYNC_EVERY_S):
            for path in folder.rglob("*.safetensors"):
                sync(path)

    done = pool.submit(keep_syncing)
    try:
        yield
    finally:
        over.set()
    done.result()


def _sync(folder: Path) -> None:
    """Wait until all files in it are on disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _publish(partial: Path, out: Path) -> None:
    """Give the release its name, for good, unless another process was quicker."""
    try:
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise CheckpointError(
            f"{out} exists by now: another process has written it meanwhile; that one stays, and nothing is "
            "left of this one"
        ) from None


@contextlib.contextmanager
def _named_errors(out: Path) -> Iterator[None]:
    """A place that cannot be written, or a full disk; safetensors has an error of its own for it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out}: cannot be written: {error}; choose another folder or make room"
        ) from None


def _size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1000`."""
    match = re.fullmatch(r"(\d+) ?([KMG]?)B?", text.strip().upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 500MB or 5GB")
    return int(match[1]) * 1000 ** " KMG".index(match[2] or " ")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, for example runs/quickstart-zero3")
    parser.add_argument("out", type=Path, help="release folder to write; must not exist")
    parser.add_argument("--step", type=int, help="of the checkpoint; by default the newest")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="number format of the released weights",
    )
    parser.add_argument(
        "--lora",
        choices=get_args(Lora),
        default="merged",
        help="of a run with LoRA: adapters merged into the backbone, as a folder that peft loads, or both",
    )
    parser.add_argument(
        "--base_model",
        help="of an adapter: the backbone's name on the hub, where the name of its folder does not say it",
    )
    parser.add_argument(
        "--shard_size",
        type=_size,
        default="5GB",
        help="bytes of a file of weights at most, as 500MB or 5GB (default 5GB)",
    )
    parser.add_argument(
        "--universal",
        type=Path,
        help="folder that deepspeed.checkpoint.ds_to_universal made of a checkpoint of the run: convert that",
    )
    arguments = parser.parse_args(argv)
    if arguments.step is not None and arguments.universal is not None:
        parser.error("--step and --universal: a universal checkpoint is of one step; give one of them")
    try:
        cosine = convert(
            arguments.run,
            arguments.out,
            dtype=getattr(torch, arguments.dtype),
            step=arguments.step,
            lora=arguments.lora,
            shard_bytes=arguments.shard_size,
            universal=arguments.universal,
            base_model=arguments.base_model,
        )
    except AgffError as error:
        return report(error)
    sys.stdout.write(
        f"{arguments.out}: released; every weight read back equal, vectors as the checkpoint's: cosine >= "
        f"{cosine:.6f}\n"
        f'load it with agff.load("{arguments.out}")\n'
    )
    return 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # as scancel: leave nothing behind
    raise SystemExit(main())
