"""`python -m tests.benchmarks.ablation` (`make ablation`): InfoNCE, the fused similarity and EGA on small
scenes, over several seeds.

One training is one process with one thread. What is done is kept in results.jsonl, by setting, seed and code:
started again, the command goes on where it stopped. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.ablation.report import FEW_SEEDS, SEEDS, markdown, tuned
from tests.benchmarks.ablation.runs import Run, all_measures
from tests.benchmarks.ablation.settings import FACTORS, TUNED, VARIANTS, Setting
from tests.benchmarks.table import Measured


def runs_of(settings: Iterable[Setting], seeds: Iterable[int]) -> list[Run]:
    """Seed by seed, so that what runs at the same time costs about the same."""
    settings = list(settings)
    return [Run(setting, seed) for seed in seeds for setting in settings]


def first_runs() -> list[Run]:
    """Everything but the best settings, which follow from these."""
    tried = [setting for of_family in TUNED.values() for setting in of_family.values()]
    swept = runs_of([*tried, *VARIANTS.values()], FEW_SEEDS)
    return list(dict.fromkeys(runs_of(FACTORS.values(), SEEDS) + swept))


def _cut(run: Run, num_steps: int | None) -> Run:
    return run if num_steps is None else replace(run, setting=replace(run.setting, num_steps=num_steps))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/ablation"),
        help="folder of the report (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=2, help="trainings at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of every training; with few, the figures mean nothing")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    results = arguments.out / "results.jsonl"

    def measure(runs: Sequence[Run], what: str) -> dict[Run, dict[str, float]]:
        """By the run as it was asked for, also where it has been cut short."""
        short = {run: _cut(run, arguments.steps) for run in runs}
        found = all_measures(list(short.values()), results, num_workers=arguments.workers, what=what)
        return {run: found[cut] for run, cut in short.items()}

    found = measure(first_runs(), "all settings")
    best = tuned(found, TUNED, FEW_SEEDS)
    found |= measure(runs_of(best.values(), SEEDS), "the best of each family")
    command = "make ablation" if arguments.steps is None else f"{arguments.steps} steps, no result"
    report = markdown(found, best, origin=Measured.here([]).origin, command=command)
    (arguments.out / "measured.md").write_text(report, encoding="utf-8")
    sys.stdout.write(report)
    sys.stderr.write(f"== done in {time.monotonic() - start:.0f} s: {arguments.out}/measured.md\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
