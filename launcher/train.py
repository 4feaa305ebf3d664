"""`deepspeed launcher/train.py --deepspeed ds_configs/zero3.json`: run a recipe, or continue an interrupted run of it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from agff.checkpoint import restore_checkpoint, save_checkpoint
from agff.engine import Engine, start_process_group
from agff.errors import AgffError
from agff.objectives.contrastive import METRICS, contrastive_loss
from agff.precision import Hardware
from agff.processor import ItemProcessor
from agff.trainer import train
from launcher.command_line import TrainArguments, parse_train_arguments, report
from launcher.config import ResolvedRun, read_deepspeed_json, resolve
from launcher.data import RunData, check_shards_together, open_data, prepare_quickstart_if_named
from launcher.distributed import RankInfo, export, rank_from_environment
from launcher.model import build_model, build_processor
from launcher.run_folder import finished_steps, write_run_folder
from launcher.run_log import RunLog
from launcher.startup_table import count_parameters, startup_table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code: 0 done, 2 for an error a person can mend."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by names torch 2.13 renamed
    try:
        rank = rank_from_environment(os.environ)
        if rank.world_size > 1:
            export(rank, os.environ)  # also tells `report` which rank speaks
        run_command(parse_train_arguments(argv), argv, rank)
    except AgffError as error:
        return report(error)
    return 0


def run_command(arguments: TrainArguments, argv: Sequence[str], rank: RankInfo) -> None:
    """Check everything that can be checked alone, then train; nothing is written before."""
    hardware = Hardware.of_this_machine()
    starts_ranks = rank.world_size == 1 and not hardware.has_gpu and arguments.config.cpu_ranks > 1
    run = resolve(
        arguments.config,
        read_deepspeed_json(arguments.deepspeed),
        deepspeed_name=arguments.deepspeed.stem,
        world_size=arguments.config.cpu_ranks if starts_ranks else rank.world_size,
        hardware=hardware,
    )
    if not arguments.dry_run:
        prepare_quickstart_if_named(arguments.config)
    data = open_data(run)
    start_step = finished_steps(run, data.plan.description)
    processor = build_processor(run.config)
    if rank.rank == 0 and (arguments.dry_run or not starts_ranks):
        _say(startup_table(run, data.plan.num_samples, *count_parameters(run.config)))
    if arguments.dry_run:
        return
    if start_step >= run.config.num_steps:
        if rank.rank == 0:
            _say(f"{run.run_dir}: all {start_step} steps are done; evaluate or convert it, or choose another --run_dir")
    elif starts_ranks:
        _start_cpu_ranks(run.world_size, argv)
    else:
        _train_on_this_rank(run, data, processor, rank, start_step)


def _train_on_this_rank(run: ResolvedRun, data: RunData, processor: ItemProcessor, rank: RankInfo, start_step: int) -> None:
    """From the process group to the last checkpoint. Collective."""
    config = run.config
    export(rank, os.environ)
    device = start_process_group(rank.local_rank)
    try:
        check_shards_together(data, hashes=config.data.check_hashes)
        if rank.rank == 0:
            write_run_folder(run)
        torch.manual_seed(config.seed)
        engine = Engine(
            build_model(run, processor),
            deepspeed_config=run.deepspeed,
            optimizer=config.optimizer,
            num_steps=config.num_steps,
            precision=run.precision,
            device=device,
        )
        torch.manual_seed(config.seed + 1 + rank.rank)  # dropout differs between ranks, weights do not
        trainable_only = config.backbone.lora is not None
        if start_step:
            restore_checkpoint(engine, run.run_dir, step=start_step, trainable_only=trainable_only)
        observer = RunLog(
            run.run_dir,
            METRICS,
            start_step=start_step,
            num_steps=config.num_steps,
            log_every=config.log_every,
            log_samples=config.log_samples,
        )
        with observer:
            train(
                engine,
                partial(contrastive_loss, config=config.loss),
                data.batches(run, processor, rank=rank.rank, start_step=start_step),
                start_step=start_step,
                num_steps=config.num_steps,
                save_every=config.save_every,
                observe=observer,
                save=lambda step: save_checkpoint(
                    engine,
                    run.run_dir,
                    step=step,
                    state={"data_plan": data.plan.description},
                    trainable_only=trainable_only,
                ),
            )
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _start_cpu_ranks(num_ranks: int, argv: Sequence[str]) -> None:
    """Become DeepSpeed's launcher with that many ranks: on a machine without accelerators it starts only one by itself."""
    arguments = [a for a in argv if not a.startswith("--local_rank")]
    with socket.socket() as probe:  # a free port: the launcher's default would let two runs on one machine collide
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    command += ["--num_accelerators", str(num_ranks)]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    sys.stdout.flush()
    os.execv(sys.executable, [*command, __file__, *arguments])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
