"""`python launcher/convert_checkpoint.py RUN OUT`: the newest ZeRO checkpoint of a run -> a release
folder."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from agff.checkpoint_folder import read_state
from agff.errors import AgffError, CheckpointError
from agff.release import check_golden, load, plain_backbone, save_release
from launcher.command_line import report
from launcher.run.config_file import read_run_config
from launcher.run.trained_model import load_run


def convert(run: Path, out: Path, *, dtype: torch.dtype) -> float:
    """Write the release and prove it: read it back, compare every weight, and its vectors with the
    checkpoint's; return their smallest cosine.

    Raises CheckpointError when OUT exists, the run has no checkpoint that can be loaded, or what was read
    back is not what was written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder or remove it")
    embedder, step = load_run(run)
    config = read_run_config(run)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    origin = {
        "run": config.name,
        "step": step,
        "seed": config.seed,
        "backbone": config.backbone.path,
        "backbone_sha256": read_state(run, step).get("backbone_sha256", "not recorded"),
    }
    live = save_release(embedder, partial, origin=origin, dtype=dtype).state_dict()
    released = load(partial, check=False)
    cosine = check_golden(released, partial, dtype=str(dtype).removeprefix("torch."))
    for name, weight in plain_backbone(released.model).state_dict().items():
        if not torch.equal(weight, live[name]):
            raise CheckpointError(
                f"{partial}: weight {name} read back differs from the checkpoint's; nothing was released"
            )
    partial.rename(out)
    return cosine


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
