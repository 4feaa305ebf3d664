"""`python -m tests.benchmarks.ablation.quickstart_beta`: the quickstart with a beta of 0.05 and of 0.1, three
seeds each, on the sheets that are found by naming one of their drawings and on the sets of single drawings.

Each is trained and scored by the commands that a person types; what has its scores is not done again. The
backbone's random weights are those of the quickstart for every seed; the seed decides prompts and the order
of the pairs. About four minutes a run on two cores, twenty-four in all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.benchmarks.ablation.report import Difference
from tests.benchmarks.table import Measured, markdown_table

BETAS = (0.05, 0.1)
SEEDS = range(3)
DATA = Path(".cache/quickstart")
Scores = dict[str, float]
"""Set and similarity -> %."""


def commands(run: Path, scores: Path, *, beta: float, seed: int) -> list[list[str]]:
    """That train the run and score it into the file `scores`."""
    data = DATA / "data"
    train = ["--deepspeed", "ds_configs/zero1.json", "--run_dir", str(run), "--seed", str(seed)]
    sets = ["--mmeb_eval", str(data / "mmeb_eval"), "--captions", str(data / "captions")]
    return [
        ["deepspeed", "launcher/train.py", *train, "--fusion.beta", str(beta)],
        [sys.executable, "launcher/evaluate.py", str(run), *sets, "--out", str(scores)],
    ]


def scores_of(values: Mapping[str, Any]) -> Scores:
    """Of a scores.json: Precision@1 of MMEB's sets, R@1 from text to image of the sheets."""
    scores = {entry["name"]: entry["score"] for entry in values["mmeb"]["sets"]}
    for entry in values["captions"]:
        for score in entry["scores"]:
            if score["direction"] == "text to image":
                scores[f"{entry['name']}, {score['similarity']}"] = score["recall_at_1"]
    return scores


def markdown(scores: Mapping[float, Sequence[Scores]], *, origin: str) -> str:
    """A row a set: means, and differences paired by seed."""
    low, high = BETAS
    rows = [
        (
            name,
            *(f"{sum(s[name] for s in scores[beta]) / len(scores[beta]):.1f}" for beta in BETAS),
            str(Difference.of([s[name] for s in scores[high]], [s[name] for s in scores[low]])),
        )
        for name in scores[low][0]
    ]
    head = ("", *(f"beta {beta}" for beta in BETAS), f"{high} - {low}, 95 %")
    words = (
        f"`python -m tests.benchmarks.ablation.quickstart_beta`, {origin}. Means of {len(scores[low])} "
        "seeds in %, differences paired by seed, ± half of the t-interval."
    )
    return "\n".join([words, "", *markdown_table(head, rows)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/ablation/quickstart_beta"), help="(default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (arguments.out / "log").open("a", encoding="utf-8") as log:

        def run(command: Sequence[str]) -> None:
            log.write(f"== {' '.join(command)}\n")
            log.flush()
            subprocess.run(command, check=True, stdout=log, stderr=log)

        run([sys.executable, "launcher/quickstart_data.py", "--out", str(DATA)])
        shards = ["--mmeb", str(DATA / "data/mmeb"), "--out", str(DATA / "shards")]
        run([sys.executable, "launcher/prepare.py", *shards])
        scores: dict[float, list[Scores]] = {beta: [] for beta in BETAS}
        with tqdm(total=len(BETAS) * len(SEEDS), desc="quickstart", unit="run", file=sys.stderr) as bar:
            for seed in SEEDS:
                for beta in BETAS:
                    folder = arguments.out / f"beta-{beta}-seed-{seed}"
                    file = arguments.out / f"{folder.name}.json"
                    if not file.exists():
                        unfinished = file.with_suffix(".partial")  # evaluation writes it set by set
                        for command in commands(folder, unfinished, beta=beta, seed=seed):
                            run(command)
                        unfinished.replace(file)
                    scores[beta].append(scores_of(json.loads(file.read_text(encoding="utf-8"))))
                    bar.update()
    report = markdown(scores, origin=Measured.here([]).origin)
    (arguments.out / "measured.md").write_text(report, encoding="utf-8")
    sys.stdout.write(report)
    sys.stderr.write(f"== done in {time.monotonic() - start:.0f} s: {arguments.out}/measured.md\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
