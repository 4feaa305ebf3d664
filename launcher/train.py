"""`deepspeed launcher/train.py`: run a recipe, or continue an interrupted run of it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from functools import partial

import torch

from agff.backbone import check_attention
from agff.checkpoint_folder import latest_step
from agff.errors import ConfigError
from agff.processor import ItemProcessor
from launcher.command_line import exit_code_of, parse_train_arguments
from launcher.quickstart.first_use import prepare_quickstart_if_named
from launcher.run.backbone_identity import backbone_of_run
from launcher.run.config import ResolvedRun, resolve
from launcher.run.cpu_ranks import before_cpu_ranks, run_cpu_ranks
from launcher.run.data import RunData, build_processor, open_data
from launcher.run.deepspeed_json import read_deepspeed_json
from launcher.run.first_stage import check_first_stage
from launcher.run.folder import check_data_plan, check_run_folder
from launcher.run.hardware import Hardware, num_unusable_gpus
from launcher.run.measured_batches import measured_batches
from launcher.run.model import check_objective
from launcher.run.ranks import RankInfo, export, rank_from_environment
from launcher.run.startup_table import count_parameters, startup_table
from launcher.run.stop_request import EXIT_CODE
from launcher.run.training import train_on_this_rank
from launcher.validation.sets import ValidationSets, check_sets_together, described, open_sets


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code.

    0: done. 75: stopped on request. 2: an error the user can fix. 1: any other.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    # DeepSpeed calls collectives by names torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning)
    return exit_code_of(partial(_start, argv))


def _start(argv: Sequence[str]) -> int:
    """Check everything that can be checked alone, then train. Returns the exit code.

    Nothing is written before, but the quickstart's own data where they are absent.
    """
    rank = rank_from_environment(os.environ)
    if rank.world_size > 1:
        export(rank, os.environ)  # also tells `report` which rank prints
    arguments = parse_train_arguments(argv)
    hardware = Hardware.of_this_machine()
    starts_ranks = rank.world_size == 1 and not hardware.has_gpu and arguments.config.cpu_ranks > 1
    if starts_ranks:
        before_cpu_ranks()
    run = resolve(
        arguments.config,
        read_deepspeed_json(arguments.deepspeed),
        deepspeed_name=arguments.deepspeed.stem,
        world_size=arguments.config.cpu_ranks if starts_ranks else rank.world_size,
        hardware=hardware,
    )
    check_attention(run.config.backbone.attention, precision=run.precision)
    if not arguments.dry_run:
        _check_gpus_are_usable()
        prepare_quickstart_if_named(arguments.config)
    data = open_data(run.config)
    run = run.with_most_negatives(data.most_negatives)
    processor = build_processor(run.config)
    check_first_stage(run.config)
    check_objective(run.config)
    sets = open_sets(run.config, data)
    check_run_folder(run)
    if rank.rank == 0:
        measured = measured_batches(run, data, processor)
        counts = count_parameters(run.config)
        validation = described(sets, run.config)
        _say(startup_table(run, data.plan.num_samples, *counts, measured=measured, validation=validation))
    if arguments.dry_run:
        if sets is not None and rank.rank == 0:
            check_sets_together(run, sets, processor, hashes=False)
        if newest := latest_step(run.run_dir):
            check_data_plan(run, data.description, step=newest)
            if rank.rank == 0:  # the ranks have not met: each would hash the backbone
                backbone_of_run(run, start_step=newest)
        return 0
    if starts_ranks:
        return run_cpu_ranks(
            run.world_size, lambda forked: exit_code_of(partial(_train, run, data, sets, processor, forked))
        )
    return _train(run, data, sets, processor, rank)


def _train(
    run: ResolvedRun,
    data: RunData,
    sets: ValidationSets | None,
    processor: ItemProcessor,
    rank: RankInfo,
) -> int:
    export(rank, os.environ)
    outcome = train_on_this_rank(run, data, sets, processor, rank)
    if rank.rank == 0 and outcome == "nothing left":
        _say(
            f"{run.run_dir}: all {run.config.num_steps} steps are done; evaluate or convert it, or choose "
            "another --run_dir"
        )
    if rank.rank == 0 and outcome == "stopped":
        _say(f"{run.run_dir}: stopped on request, everything is saved; the same command continues")
    return EXIT_CODE if outcome == "stopped" else 0


def _check_gpus_are_usable() -> None:
    """A job that holds GPUs, or one machine of it, must not train on the CPU because torch and the driver
    disagree."""
    if count := num_unusable_gpus(os.environ):
        raise ConfigError(
            f"{socket.gethostname()}: the driver knows {count} NVIDIA GPUs, torch {torch.__version__} (CUDA "
            f"{torch.version.cuda}) can use none; compare the CUDA version that nvidia-smi prints, install a "
            "newer driver or torch's build for this one, or train on the CPU with DS_ACCELERATOR=cpu"
        )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
