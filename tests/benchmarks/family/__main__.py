"""`python -m tests.benchmarks.family` (`make family`): train every method of the family on the quickstart,
judge them on the same sets, print one table.

All begin with the same backbone and see equally many pairs, by the same seed: a method of two stages splits
them. Interrupted, the same command continues; with other code or settings what depends on them is made again.
`python -m tests.benchmarks.family.report .cache/family/measured.json` puts the table into the README.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from agff.errors import AgffError
from launcher.command_line import RECIPES
from launcher.run.config_file import read_recipe
from tests.benchmarks.family.methods import METHODS
from tests.benchmarks.family.runner import run_command, run_tasks, source_digest
from tests.benchmarks.family.table import table_of
from tests.benchmarks.family.tasks import Comparison

SOURCES = [Path(name) for name in ("agff", "data_pipeline", "launcher", "ds_configs")]
NUM_PAIRS = 48_000
"""750 steps of 64 pairs, 1.5 x the quickstart's: what 2 cores do for all methods in half an hour."""


@cache
def batch_size_of(recipe: str) -> int:
    """Pairs of a step."""
    return read_recipe(RECIPES / f"{recipe}.yaml").batch.global_batch_size


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="family", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [method.name for method in METHODS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="methods (default: all)")
    parser.add_argument(
        "--num_pairs", type=int, default=NUM_PAIRS, help="of each method (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every run (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/family"), help="folder of everything (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # no core spins while a rank waits for its turn
    comparison = Comparison(
        methods=tuple(method for method in METHODS if method.name in arguments.only),
        num_pairs=arguments.num_pairs,
        folder=arguments.out,
        seed=arguments.seed,
        batch_size_of=batch_size_of,
    )
    try:
        seconds = run_tasks(comparison.tasks(), arguments.out, code=source_digest(SOURCES), run=run_command)
    except (AgffError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    table = table_of(comparison, seconds)
    table.write(arguments.out)
    sys.stdout.write(table.markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
