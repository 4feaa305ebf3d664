"""`python launcher/mine.py MODEL MMEB OUT`: hard negatives for MMEB-train, found by a trained model."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from agff.errors import ConfigError
from data_pipeline.layouts.mmeb_train import SPLITS, MmebTrain
from launcher.command_line import exit_code_of
from launcher.embedding.corpus_vectors import HowToEncode
from launcher.embedding.taken_folder import CLAIM_FILE, taken
from launcher.embedding.teacher import open_embedder
from launcher.mining.rules import MiningRules
from launcher.mining.subsets import MINING_FILE, Mining, chosen_rows, mine_subset
from launcher.mining.tables import finish, report_table
from launcher.run.meeting import from_first_rank, leave, meet, together
from launcher.run.ranks import RankInfo, rank_from_environment
from launcher.run.trained_model import load_together

ABOUT = """\
Find hard negatives for the rows of MMEB-train's tables, and write the tables with them.

MODEL  a release or run of ours
MMEB   folder of the download: <SUBSET>/*.parquet and images/
OUT    the same layout: tables with the columns neg_text and neg_image_path as lists, links to the images,
       mining.json. `python launcher/prepare.py --mmeb OUT --out SHARDS` reads it, and training takes all
       negatives. A table's own negatives are replaced; neg_similarity and pos_similarity are for a look.

The candidates of a query are all distinct targets of its subset, ordered by the fused similarity. Left out
are, in this order: what is an answer of the query by its content (image bytes, and text but for case and
blanks) in any row, and the query itself; the first --skip_ranks; what is below --max_rank; what is more than
--margin above the positive, which may be an answer that nobody marked. Of the rest the --num_negatives most
similar stay, the one that comes first in the tables where equal. A query may keep fewer, or none. A query's
image with another text beside it is another item, and may become its negative, as in CIRR.

On several GPUs or machines: `torchrun --nproc-per-node 8 launcher/mine.py ...`, `deepspeed` or `srun python`;
OUT must be seen by all. The same negatives come out on any number of ranks. After a kill the same command
continues. One command writes OUT at a time: a second one waits for the first.

  python launcher/mine.py releases/quickstart .cache/quickstart/data/mmeb mined --num_negatives 4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, of torch's new names
    arguments = parser().parse_args(argv)
    return exit_code_of(lambda: _mine(arguments))


def _mine(arguments: argparse.Namespace) -> int:
    rank = rank_from_environment(os.environ)
    mine_on_this_rank(arguments, rank, meet(rank))
    leave()
    return 0


def mine_on_this_rank(arguments: argparse.Namespace, rank: RankInfo, device: torch.device) -> None:
    """Mine this rank's rows; rank 0 makes tables of all. Collective. Raises AgffError on all ranks."""
    rules = together(lambda: _rules(arguments))
    layout = MmebTrain(root=arguments.mmeb, split=arguments.split)
    rows = from_first_rank(lambda: chosen_rows(layout, arguments.subsets, rules))
    mining = Mining(
        embedder=load_together(lambda: open_embedder(arguments.model, device)),
        model=arguments.model,
        layout=layout,
        rows=rows,
        rules=rules,
        how=HowToEncode(batch_size=arguments.batch_size, dtype="float32", num_workers=arguments.num_workers),
        out=arguments.out,
    )
    if arguments.dry_run:
        _say(rank, "\n".join(f"{name:<24} {count:>11,} rows" for name, count in rows.items()))
        return
    with taken(arguments.out, rank):
        from_first_rank(lambda: _begin(mining))
        for subset in rows:
            mine_subset(mining, subset, rank, device)
        reports = from_first_rank(lambda: finish(mining))
    _say(rank, report_table(reports, num_negatives=rules.num_negatives))
    _say(rank, f"written: {arguments.out}; python launcher/prepare.py --mmeb {arguments.out} --out SHARDS")


def _rules(arguments: argparse.Namespace) -> MiningRules:
    if arguments.batch_size < 1 or arguments.num_workers < 0:
        raise ConfigError(
            f"--batch_size {arguments.batch_size} must be >= 1, --num_workers {arguments.num_workers} >= 0"
        )
    return MiningRules(
        num_negatives=arguments.num_negatives,
        skip_ranks=arguments.skip_ranks,
        max_rank=arguments.max_rank,
        margin=arguments.margin,
    )


def _begin(mining: Mining) -> None:
    """Take the folder. Raises ConfigError when it holds something else."""
    others = [path.name for path in mining.out.iterdir() if path.name != CLAIM_FILE]
    if others and not mining.work.is_begun:
        raise ConfigError(
            f"{mining.out} exists and holds nothing that was mined ({MINING_FILE} is missing), but "
            f"{others[0]}; choose another folder"
        )
    mining.work.begin(mining.settings(), what="negatives")


def _say(rank: RankInfo, text: str) -> None:
    if rank.rank == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _margin(text: str) -> float | None:
    if text == "none":
        return None
    value = float(text)
    if not -2 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{value} must be between -2 and 2, or none")
    return value


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="mine", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", type=Path, help="release or run folder")
    made.add_argument("mmeb", type=Path, help="folder of an MMEB-train download")
    made.add_argument("out", type=Path, help="folder to write; a begun one is continued")
    made.add_argument("--subsets", nargs="+", help="only these subsets (default: all)")
    made.add_argument(
        "--split", choices=SPLITS, default=SPLITS[0], help="which parquet files (default: %(default)s)"
    )
    made.add_argument(
        "--num_negatives", type=int, default=1, help="of each query, at most (default: %(default)s)"
    )
    made.add_argument(
        "--skip_ranks", type=int, default=0, help="leave the most similar out (default: %(default)s)"
    )
    made.add_argument(
        "--max_rank", type=int, default=100, help="the last rank that is looked at (default: %(default)s)"
    )
    made.add_argument(
        "--margin",
        type=_margin,
        default=0.1,
        help="leave out what is more than this above the positive, in units of the fused similarity, or none "
        "(default: %(default)s, UniME's)",
    )
    made.add_argument(
        "--batch_size", type=int, default=32, help="items encoded at once (default: %(default)s)"
    )
    made.add_argument(
        "--num_workers", type=int, default=2, help="processes of a rank that load items (default: 2)"
    )
    made.add_argument("--dry-run", action="store_true", help="load and count everything, write nothing")
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    return made


if __name__ == "__main__":
    raise SystemExit(main())
