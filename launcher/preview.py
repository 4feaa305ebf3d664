"""`python launcher/preview.py SHARDS`: one HTML page that shows, pair by pair, what the loader yields."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from agff.batch import IMAGE_PLACEHOLDER
from agff.errors import AgffError, ConfigError
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from data_pipeline.manifest import read_manifest
from data_pipeline.plan import Mixture, Plan
from data_pipeline.reader import ShardReader
from data_pipeline.remote import CacheConfig, open_folder
from launcher.command_line import report
from launcher.previewing.page import page
from launcher.previewing.samples import SampleView, TextView

ABOUT = """\
Write one HTML page that shows what the loader yields: for each step its sub-batches, for each pair its images
and texts.

The order is that of a training run with the same shards, weights, caps, seed and batch sizes. With --backbone
the page also shows each text as the model gets it: cut to --max_tokens, image and prompts in their places. A
sample that cannot be used stands on the page in red, with its reason and with the sample that is drawn in its
place. Of remote shards, those that hold the shown samples are fetched whole into ~/.cache/agff/shards.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="preview", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", metavar="SHARDS", help="folder written by launcher/prepare.py, or its URL")
    parser.add_argument(
        "--steps", type=int, default=2, help="how many steps are shown (default: %(default)s)"
    )
    parser.add_argument("--start_step", type=int, default=0, help="the first one (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=16, help="pairs of a global batch (default: %(default)s)"
    )
    parser.add_argument(
        "--sub_batch_size", type=int, default=4, help="pairs of a sub-batch (default: %(default)s)"
    )
    parser.add_argument(
        "--weights", help='JSON object, source -> share of the sub-batches; for example {"A": 2, "B": 1}'
    )
    parser.add_argument("--caps", type=int, help="samples used of each source at most (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument(
        "--backbone", type=Path, help="Hugging Face folder; shows texts as the model sees them"
    )
    parser.add_argument(
        "--max_tokens", type=int, help=f"tokens of an item (default: {ProcessorConfig.max_tokens})"
    )
    parser.add_argument(
        "--max_pixels", type=int, help="larger images are reduced (default: the backbone's own limit)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("preview.html"), help="the page (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        sys.stdout.write(write_preview(arguments) + "\n")
    except AgffError as error:
        return report(error)
    return 0


def write_preview(arguments: argparse.Namespace) -> str:
    """Write the page that the command line asks for; the line that says so. Raises DataError or
    ConfigError."""
    _check(arguments)
    folder = open_folder(arguments.shards, CacheConfig())
    manifest = read_manifest(folder)
    weights = _read_weights(arguments.weights)
    mixture = Mixture(weights=weights, caps=arguments.caps, sub_batch_size=arguments.sub_batch_size)
    plan = Plan(manifest, mixture, seed=arguments.seed, global_batch_size=arguments.batch_size)
    processor = _processor(arguments)
    view = SampleView(
        plan=plan, reader=ShardReader(folder, manifest), text_view=TextView(processor) if processor else None
    )
    with tqdm(total=arguments.steps * arguments.batch_size, desc="preview", unit="pair") as bar:
        steps = [
            view.step(number, bar)
            for number in range(arguments.start_step, arguments.start_step + arguments.steps)
        ]
    content = page(folder.location, manifest, plan, _settings(arguments, processor), steps)
    try:
        # a text may hold half of a surrogate pair, which no UTF-8 file can
        arguments.out.write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(
            f"--out {arguments.out}: cannot write the page: {error.strerror}; choose another file"
        ) from None
    num_unusable = sum(sub_batch.num_unusable for step in steps for sub_batch in step.sub_batches)
    return (
        f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB): "
        f"steps {steps[0].number} to {steps[-1].number}, "
        f"{view.plan.description['global_batch_size'] * len(steps)} pairs, {num_unusable} unusable samples"
    )


def _check(arguments: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "sub_batch_size", "max_pixels"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be >= 1")
    for name in ("start_step", "seed"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be >= 0")
    for name in ("max_tokens", "max_pixels"):
        if getattr(arguments, name) is not None and arguments.backbone is None:
            raise ConfigError(f"--{name} needs --backbone DIR: without one nothing is cut or reduced")


def _read_weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        weights = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"--weights {text}: not JSON: {error}; write for example " + '{"A": 2, "B": 1}'
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(weight, int | float) and math.isfinite(weight) for weight in weights.values()
    ):
        raise ConfigError(
            f"--weights {text}: expected a JSON object of numbers, for example " + '{"A": 2, "B": 1}'
        )
    return weights


def _processor(arguments: argparse.Namespace) -> ItemProcessor | None:
    if arguments.backbone is None:
        return None
    max_tokens = ProcessorConfig.max_tokens if arguments.max_tokens is None else arguments.max_tokens
    limits = ProcessorConfig(max_tokens=max_tokens, max_pixels=arguments.max_pixels)
    return ItemProcessor.from_folder(arguments.backbone, prompts=PromptConfig(), limits=limits)


def _settings(arguments: argparse.Namespace, processor: ItemProcessor | None) -> dict[str, object]:
    """Name and value of each setting, for people."""
    settings = {
        "first step": arguments.start_step,
        "steps": arguments.steps,
        "pairs in a global batch": arguments.batch_size,
        "pairs in a sub-batch": arguments.sub_batch_size,
        "weights": arguments.weights or "number of pairs of each source",
        "cap of each source": "none" if arguments.caps is None else f"{arguments.caps:,} pairs",
        "seed": arguments.seed,
    }
    if processor is None:
        return {
            **settings,
            "backbone": f"none: texts are raw, {IMAGE_PLACEHOLDER} stands where the image belongs",
        }
    return {
        **settings,
        "backbone": arguments.backbone,
        "tokens of an item": (
            f"at most {processor.limits.max_tokens:,}, of which {processor.prompts.num_tokens} are prompts"
        ),
        "pixels of an image": f"at most {processor.max_image_pixels:,}; larger images are reduced",
    }


if __name__ == "__main__":
    raise SystemExit(main())
