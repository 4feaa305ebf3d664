"""`deepspeed launcher/train.py --deepspeed ds_configs/zero3.json`: run a recipe, or continue an interrupted run of it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from agff.checkpoint import latest_step, newest_intact_step, remove_old_checkpoints, restore_checkpoint, save_checkpoint
from agff.collectives import rank as engine_rank
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
from launcher.run_folder import check_data_plan, check_run_folder, write_run_folder
from launcher.run_log import RunLog
from launcher.startup_table import count_parameters, startup_table
from launcher.stop_request import EXIT_CODE, StopRequest
from launcher.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code: 0 done, 75 stopped on request, 2 for an error a person can mend."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by names torch 2.13 renamed
    try:
        rank = rank_from_environment(os.environ)
        if rank.world_size > 1:
            export(rank, os.environ)  # also tells `report` which rank speaks
        return run_command(parse_train_arguments(argv), argv, rank)
    except AgffError as error:
        return report(error)


def run_command(arguments: TrainArguments, argv: Sequence[str], rank: RankInfo) -> int:
    """Check everything that can be checked alone, then train; nothing is written before. Returns the exit code."""
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
    check_run_folder(run)
    newest = latest_step(run.run_dir)
    if newest:
        check_data_plan(run, data.plan.description, step=newest)
    processor = build_processor(run.config)
    if rank.rank == 0 and (arguments.dry_run or not starts_ranks):
        _say(startup_table(run, data.plan.num_samples, *count_parameters(run.config)))
    if arguments.dry_run:
        return 0
    if starts_ranks:
        if newest == run.config.num_steps:
            return _say_done(run)
        _start_cpu_ranks(run.world_size, argv)
    stop = StopRequest()
    stop.listen()
    try:
        return _train_on_this_rank(run, data, processor, rank, stop)
    except AgffError as error:
        if not error.on_all_ranks and rank.rank:  # nobody else knows of it
            sys.stderr.write(f"error on rank {rank.rank}: {error}\n")
        raise
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"error on rank {rank.rank}: {_out_of_memory(run, error)}\n")
        return 2


def _train_on_this_rank(run: ResolvedRun, data: RunData, processor: ItemProcessor, rank: RankInfo, stop: StopRequest) -> int:
    """From the process group to the last checkpoint; returns the exit code. Collective."""
    config = run.config
    export(rank, os.environ)
    device = start_process_group(rank.local_rank, timeout_s=config.collective_timeout_s)
    try:
        check_shards_together(data, hashes=config.data.check_hashes)
        start_step = newest_intact_step(run.run_dir, device=device) or 0
        if start_step >= config.num_steps:
            return _say_done(run) if rank.rank == 0 else 0
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
        with observer, Watchdog(rank.rank, after_s=config.stalled_step_s) as watchdog:
            is_done = train(
                engine,
                partial(contrastive_loss, config=config.loss),
                data.batches(run, processor, rank=rank.rank, start_step=start_step),
                start_step=start_step,
                num_steps=config.num_steps,
                save_every=config.save_every,
                max_skipped_in_a_row=config.max_skipped_in_a_row,
                observe=observer,
                save=partial(_save, engine, run, data.plan.description),
                should_stop=lambda: bool(stop),
                mark=watchdog.mark,
            )
        dist.barrier()
        stop.ignore()
        if is_done:
            return 0
        if rank.rank == 0:
            _say(f"{run.run_dir}: stopped on request, everything is saved; the same command continues")
        return EXIT_CODE
    finally:
        dist.destroy_process_group()


def _say_done(run: ResolvedRun) -> int:
    _say(f"{run.run_dir}: all {run.config.num_steps} steps are done; evaluate or convert it, or choose another --run_dir")
    return 0


def _save(engine: Engine, run: ResolvedRun, data_plan: Mapping[str, Any], step: int) -> None:
    """A checkpoint, then what it makes superfluous goes. Collective."""
    is_lora = run.config.backbone.lora is not None
    save_checkpoint(engine, run.run_dir, step=step, state={"data_plan": data_plan}, trainable_only=is_lora)
    if engine_rank() == 0:
        remove_old_checkpoints(run.run_dir, keep_last=run.config.keep_last, keep_every=run.config.keep_every)


def _out_of_memory(run: ResolvedRun, error: torch.OutOfMemoryError) -> str:
    batch, first = run.config.batch, str(error).splitlines()[0]
    now = "chunk_size" if batch.chunk_size else "max_tokens_per_chunk"
    return (
        f"{first} Lower batch.{now} (now {getattr(batch, now)}; the result does not change) or processor.max_pixels, "
        "or use more ranks, or ds_configs/zero3_offload.json"
    )


def _start_cpu_ranks(num_ranks: int, argv: Sequence[str]) -> NoReturn:
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
