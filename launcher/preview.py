"""`python launcher/preview.py --recipe NAME`: one HTML page that shows the batches of a run, pair by pair."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from agff.errors import AgffError, ConfigError
from agff.files import write_text
from agff.processor import ItemProcessor
from data_pipeline.reader import ShardReader
from launcher.command_line import parse_recipe, recipe_parser, report
from launcher.previewing.page import page
from launcher.previewing.samples import SampleView, TextView
from launcher.quickstart.first_use import prepare_quickstart_if_named
from launcher.run.config import RunConfig
from launcher.run.data import build_processor, open_data

ABOUT = """
Write one HTML page that shows the batches of a run: the sub-batches of each step, the images and texts of
each pair, and each text as the model gets it, cut to the run's limits, with image and prompts in place.

Give the recipe and the dotted overrides of the run, as to train; the number of ranks does not matter. A
sample that cannot be used is shown in red, with its reason and with the sample that is drawn instead. A
remote shard is fetched whole into data.cache.dir when one of its samples is shown.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = recipe_parser("preview", ABOUT)
    parser.add_argument("--steps", type=int, default=2, help="steps to show")
    parser.add_argument("--start_step", type=int, default=0, help="the first step to show")
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the page")
    try:
        config, own = parse_recipe(parser, sys.argv[1:] if argv is None else argv)
        steps = _steps(config, start=own.start_step, count=own.steps)
        prepare_quickstart_if_named(config)
        sys.stdout.write(_write_preview(config, steps, own.out) + "\n")
    except AgffError as error:
        return report(error)
    return 0


def _write_preview(config: RunConfig, steps: range, out: Path) -> str:
    """Write the page; returns the line that reports it. Raises DataError, StorageError or ConfigError."""
    if not out.parent.is_dir():  # before anything is drawn
        raise ConfigError(f"--out {out}: cannot write the page: no such folder; choose another file")
    data, processor = open_data(config), build_processor(config)
    view = SampleView(
        plan=data.plan,
        reader=ShardReader(data.folder, data.manifest),
        text_view=TextView(processor),
        with_negatives=config.data.with_negatives,
        max_bad_in_a_row=config.data.max_bad_in_a_row,
    )
    num_pairs = len(steps) * config.batch.global_batch_size
    with tqdm(total=num_pairs, desc="preview", unit="pair") as bar:
        shown = [view.step(number, bar) for number in steps]
    settings = _settings(config, processor, steps)
    content = page(config.name, data.folder.location, data.manifest, data.plan, settings, shown)
    # a text may hold half of a surrogate pair, which no UTF-8 file can
    content = content.encode("utf-8", errors="backslashreplace").decode("utf-8")
    try:
        write_text(out, content)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot write the page: {error.strerror}; choose another file"
        ) from None
    num_unusable = sum(sub_batch.num_unusable for step in shown for sub_batch in step.sub_batches)
    return (
        f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): steps {steps[0]} to {steps[-1]}, "
        f"{num_pairs} pairs, {num_unusable} unusable samples"
    )


def _steps(config: RunConfig, *, start: int, count: int) -> range:
    if count < 1:
        raise ConfigError(f"--steps {count} must be >= 1")
    if start < 0:
        raise ConfigError(f"--start_step {start} must be >= 0")
    if start + count > config.num_steps:
        raise ConfigError(
            f"--start_step {start} --steps {count}: the run has steps 0 to {config.num_steps - 1} "
            "(num_steps); show earlier ones"
        )
    return range(start, start + count)


def _settings(config: RunConfig, processor: ItemProcessor, steps: range) -> Mapping[str, object]:
    """Name and value of each setting, for people."""
    data, pixels = config.data, f"at most {processor.max_image_pixels:,}; larger images are reduced"
    if config.processor.min_pixels is not None:
        pixels += f"; smaller than {config.processor.min_pixels:,} are enlarged"
    return {
        "steps shown": f"{steps[0]} to {steps[-1]} of {config.num_steps:,}",
        "pairs in a global batch": config.batch.global_batch_size,
        "pairs in a sub-batch": data.sub_batch_size,
        "weights": _named(data.weights) if data.weights else "number of pairs of each source",
        "pairs used of a source": _caps(data.caps),
        "seed": config.seed,
        "hard negatives": (
            "shown where a source has them" if data.with_negatives else "left out (data.with_negatives)"
        ),
        "backbone": config.backbone.path,
        "tokens of an item": (
            f"at most {config.processor.max_tokens:,}, of which {config.prompts.num_tokens} are prompts"
        ),
        "pixels of an image": pixels,
    }


def _caps(caps: int | Mapping[str, int] | None) -> str:
    if caps is None:
        return "all"
    return f"at most {_named(caps)}" if isinstance(caps, Mapping) else f"at most {caps:,}"


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


if __name__ == "__main__":
    raise SystemExit(main())
