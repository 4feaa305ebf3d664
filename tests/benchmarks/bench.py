"""`python -m tests.benchmarks.bench` (`make bench`): one table of ratios, each measured in turn in one run.

step: ours beside a bare torch loop. peers: ours beside the public two-pass step. before: the quickstart's
step beside that of an earlier commit. loss: beside its three matrix products. flops: executed beside needed
ones of each recipe at real widths, and a rank's memory by formula. memory: growth with the batch. loader:
beside a loop that only decodes. evaluation: beside the bare model on prepared inputs. conversion: beside a
copy.

The machine should have nothing else to do. `python -m tests.benchmarks.report .cache/bench/measured.json`
puts the table into the READMEs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.table import Measured, Row
from tests.benchmarks.turns import Ratio

Group = Callable[[argparse.Namespace, Path], list[Row]]
"""(arguments, folder of a backbone) -> rows. What a group needs is imported by it: a child that another group
starts needs none of it, and one that runs the code of another commit must not have ours."""


def _step(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.steps import against_bare_loop

    return against_bare_loop(folder, quick=arguments.quick, precision=arguments.precision)


def _peers(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.steps import against_public_step

    return against_public_step(folder, quick=arguments.quick)


def _before(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.before import against_earlier_commit

    return against_earlier_commit(folder, quick=arguments.quick)


def _loss(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.fused_loss import Size, loss_rows

    rows, candidates, widths, repeats = (16, 64, (32,), 3) if arguments.quick else (256, 8192, (256, 1536), 9)
    threads = os.cpu_count() or 1
    sizes = [
        Size(rows=rows, candidates=candidates, k=4, dim=dim, device="cpu", threads=threads) for dim in widths
    ]
    return [
        Row.of(
            Ratio.of_rounds(row["ratios"]),
            group="loss",
            what=f"loss and gradients at {rows} x {candidates:,}, K = 4",
            case=f"D = {row['dim']:,}",
            against="its three matrix products",
            quantity="time",
            note=f"{row['ours_s']:.3f} s, {row['ours_peak_bytes'] / 2**20:,.0f} MiB",
        )
        for row in loss_rows(sizes, repeats=repeats)
    ]


def _flops(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.recipe_flops import flops_rows
    from tests.benchmarks.recipe_memory import memory_rows

    return flops_rows() + memory_rows()


def _memory(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.memory import memory_rows

    return memory_rows(folder, quick=arguments.quick)


def _loader(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.loader_throughput import loader_rows

    return loader_rows(quick=arguments.quick)


def _evaluation(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.evaluation import evaluation_rows

    return evaluation_rows(folder, quick=arguments.quick)


def _conversion(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from tests.benchmarks.conversion import conversion_rows

    return conversion_rows(quick=arguments.quick)


GROUPS: dict[str, Group] = {
    "step": _step,
    "peers": _peers,
    "before": _before,
    "loss": _loss,
    "flops": _flops,
    "memory": _memory,
    "loader": _loader,
    "evaluation": _evaluation,
    "conversion": _conversion,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="groups of rows"
    )
    parser.add_argument("--quick", action="store_true", help="does it run? The figures mean nothing")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16_autocast"],
        default="fp32",
        help="of the steps beside the bare loop (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/bench"), help="folder of the table (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    from tests.benchmarks.synthetic import write_backbone

    # no operator is compiled, no core spins while a rank waits for its turn
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    rows: list[Row] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = write_backbone(Path(name), quick=arguments.quick)
        for group in arguments.only:
            sys.stderr.write(f"== {group} ({time.monotonic() - start:.0f} s)\n")
            rows += GROUPS[group](arguments, folder)
            Measured.here(rows).write(arguments.out)
    sys.stdout.write((arguments.out / "measured.md").read_text(encoding="utf-8"))
    sys.stderr.write(f"== done in {time.monotonic() - start:.0f} s: {arguments.out}/measured.md\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
