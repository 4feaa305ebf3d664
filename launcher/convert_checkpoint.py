"""`python launcher/convert_checkpoint.py RUN OUT`: the newest ZeRO checkpoint of a run -> a release
folder."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from agff.embedder import Embedder
from agff.errors import AgffError, CheckpointError
from agff.files import partial_path
from agff.release import check_golden, load, plain_backbone, save_release
from launcher.command_line import report
from launcher.run.config_file import read_run_config
from launcher.run.origin import origin_of
from launcher.run.trained_model import load_run


def convert(run: Path, out: Path, *, dtype: torch.dtype) -> float:
    """Write the release and prove it: read it back, compare every weight, and its vectors with the
    checkpoint's; return their smallest cosine.

    Raises CheckpointError when OUT exists or cannot be written, which is tried before anything is read, when
    the run has no checkpoint that can be loaded, or what was read back is not what was written. Then nothing
    is left of it.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder or remove it")
    partial = partial_path(out)
    try:
        with _named_errors(out):
            partial.mkdir(parents=True)
        embedder, step = load_run(run)
        origin = origin_of(run, read_run_config(run), step)
        with _named_errors(out):
            cosine = _write_and_compare(embedder, partial, origin, dtype)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return cosine


def _write_and_compare(embedder: Embedder, folder: Path, origin: dict[str, Any], dtype: torch.dtype) -> float:
    live = save_release(embedder, folder, origin=origin, dtype=dtype).state_dict() | _head(embedder)
    released = load(folder, check=False)
    cosine = check_golden(released, folder, dtype=str(dtype).removeprefix("torch."))
    for name, weight in (plain_backbone(released.model).state_dict() | _head(released)).items():
        if not torch.equal(weight, live[name]):
            raise CheckpointError(
                f"{folder}: weight {name} read back differs from the checkpoint's; nothing was released"
            )
    return cosine


def _head(embedder: Embedder) -> dict[str, torch.Tensor]:
    """Weights of the head that is part of the model, by the names of its file."""
    head = embedder.model.head
    return {f"head.{name}": weight for name, weight in head.state_dict().items()} if head is not None else {}


@contextlib.contextmanager
def _named_errors(out: Path) -> Iterator[None]:
    """A place that cannot be written, or a full disk; safetensors has an error of its own for it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out}: cannot be written: {error}; choose another folder or make room"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, for example runs/quickstart-zero3")
    parser.add_argument("out", type=Path, help="release folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="number format of the released weights",
    )
    arguments = parser.parse_args(argv)
    try:
        cosine = convert(arguments.run, arguments.out, dtype=getattr(torch, arguments.dtype))
    except AgffError as error:
        return report(error)
    sys.stdout.write(
        f"{arguments.out}: released; every weight read back equal, vectors as the checkpoint's: cosine >= "
        f"{cosine:.6f}\n"
        f'load it with agff.load("{arguments.out}")\n'
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
