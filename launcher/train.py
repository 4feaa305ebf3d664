"""`deepspeed launcher/train.py --deepspeed ds_configs/zero3.json`: run a recipe, or continue an interrupted
run of it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from agff.backbone import check_attention
from agff.checkpoint import newest_intact_step, restore_checkpoint, save_checkpoint
from agff.checkpoint_folder import latest_step, remove_old_checkpoints, remove_unfinished
from agff.collectives import rank as engine_rank
from agff.engine import Engine, start_process_group
from agff.errors import AgffError, ConfigError, TrainingError
from agff.objectives.contrastive import METRICS, contrastive_loss
from agff.processor import ItemProcessor
from agff.trainer import train
from launcher.command_line import TrainArguments, parse_train_arguments, report
from launcher.quickstart.first_use import prepare_quickstart_if_named
from launcher.run.backbone_identity import backbone_of_run
from launcher.run.config import ResolvedRun, resolve
from launcher.run.cpu_ranks import start_cpu_ranks
from launcher.run.data import RunData, build_processor, check_shards_together, open_data
from launcher.run.deepspeed_json import read_deepspeed_json
from launcher.run.folder import (
    check_data_plan,
    check_run_folder,
    check_run_folder_together,
    hold_run_folder,
    write_run_folder,
)
from launcher.run.hardware import Hardware, num_unusable_gpus
from launcher.run.log import RunLog
from launcher.run.model import build_model
from launcher.run.ranks import RankInfo, export, rank_from_environment
from launcher.run.startup_table import count_parameters, startup_table
from launcher.run.stop_request import EXIT_CODE, StopRequest
from launcher.run.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank; returns the exit code.

    0: done. 75: stopped on request. 2: an error a person can mend. 1: any other.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # DeepSpeed calls collectives by names torch 2.13 renamed
    try:
        rank = rank_from_environment(os.environ)
        if rank.world_size > 1:
            export(rank, os.environ)  # also tells `report` which rank speaks
        return run_command(parse_train_arguments(argv), argv, rank)
    except AgffError as error:
        return _leave(report(error), with_others=error.on_all_ranks)
    except Exception:  # a mistake of ours or a broken machine: say at once whose words these are
        words = (
            f"error on rank {os.environ.get('RANK', '0')} ({socket.gethostname()}):\n{traceback.format_exc()}"
        )
        sys.stderr.write(f"\n{words}")  # below the progress bar
        return _leave(1, with_others=False)


def _leave(code: int, *, with_others: bool) -> int:
    """The exit code; or the end of this process, when the others still wait for it.

    Leaving the process group in good order may wait for them, as long as `collective_timeout_s`; the launcher
    ends them when this process ends.
    """
    if dist.is_initialized() and not with_others:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def run_command(arguments: TrainArguments, argv: Sequence[str], rank: RankInfo) -> int:
    """Check everything that can be checked alone, then train. Returns the exit code.

    Nothing is written before, but the quickstart's own data where they are absent.
    """
    hardware = Hardware.of_this_machine()
    starts_ranks = rank.world_size == 1 and not hardware.has_gpu and arguments.config.cpu_ranks > 1
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
    check_run_folder(run)
    processor = build_processor(run.config)
    if rank.rank == 0 and (arguments.dry_run or not starts_ranks):
        _say(startup_table(run, data.plan.num_samples, *count_parameters(run.config)))
    if arguments.dry_run:
        if newest := latest_step(run.run_dir):
            check_data_plan(run, data.plan.description, step=newest)
            backbone_of_run(run, start_step=newest)
        return 0
    if starts_ranks:
        start_cpu_ranks(run.world_size, __file__, argv)
    stop = StopRequest()
    stop.listen()
    try:
        return _train_on_this_rank(run, data, processor, rank, stop)
    except torch.OutOfMemoryError as error:
        raise TrainingError(_out_of_memory(run, error)) from None


def _check_gpus_are_usable() -> None:
    """A job that holds GPUs, or one machine of it, must not train on the CPU because torch and the driver
    disagree."""
    if count := num_unusable_gpus(os.environ):
        raise ConfigError(
            f"{socket.gethostname()}: the driver knows {count} NVIDIA GPUs, torch {torch.__version__} (CUDA "
            f"{torch.version.cuda}) can use none; compare the CUDA version that nvidia-smi prints, install a "
            "newer driver or torch's build for this one, or train on the CPU with DS_ACCELERATOR=cpu"
        )


def _train_on_this_rank(
    run: ResolvedRun, data: RunData, processor: ItemProcessor, rank: RankInfo, stop: StopRequest
) -> int:
    """From the process group to the last checkpoint; returns the exit code. Collective."""
    export(rank, os.environ)
    device = start_process_group(rank.local_rank, timeout_s=run.config.collective_timeout_s)
    check_shards_together(data, hashes=run.config.data.check_hashes)
    with hold_run_folder(run.run_dir, patience_s=min(120.0, run.config.collective_timeout_s / 2)):
        check_run_folder_together(run)  # another job may have begun a run here since
        if rank.rank == 0:
            remove_unfinished(run.run_dir)
        start_step = newest_intact_step(run.run_dir, device=device) or 0
        had_steps_left = start_step < run.config.num_steps
        is_done = not had_steps_left or _train_from(start_step, run, data, processor, rank, device, stop)
        dist.barrier()
        stop.ignore()
    dist.destroy_process_group()
    if rank.rank == 0 and not had_steps_left:
        return _say_done(run)
    if rank.rank == 0 and not is_done:
        _say(f"{run.run_dir}: stopped on request, everything is saved; the same command continues")
    return 0 if is_done else EXIT_CODE


def _train_from(
    start_step: int,
    run: ResolvedRun,
    data: RunData,
    processor: ItemProcessor,
    rank: RankInfo,
    device: torch.device,
    stop: StopRequest,
) -> bool:
    """The rest of the run; False when stopped on request. Collective."""
    config = run.config
    if start_step:
        check_data_plan(run, data.plan.description, step=start_step)
    state = {
        "data_plan": data.plan.description,
        "backbone_sha256": backbone_of_run(run, start_step=start_step),
    }
    if rank.rank == 0:
        write_run_folder(run)
    torch.manual_seed(config.seed)
    engine = Engine(
        build_model(run, processor),
        deepspeed_config=run.deepspeed,
        optimizer=config.optimizer,
        num_steps=config.num_steps,
        autocast_dtype=run.autocast_dtype,
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
        spike_deviations=config.loss_spike_deviations,
    )
    batches = data.batches(run, processor, rank=rank.rank, start_step=start_step)
    with observer, closing(batches), Watchdog(rank.rank, after_s=config.stalled_step_s) as watchdog:
        return train(
            engine,
            partial(contrastive_loss, config=config.loss, fusion=config.fusion),
            batches,
            start_step=start_step,
            num_steps=config.num_steps,
            save_every=config.save_every,
            max_skipped_in_a_row=config.max_skipped_in_a_row,
            observe=observer,
            save=partial(_save, engine, run, state),
            should_stop=lambda: bool(stop),
            mark=watchdog.mark,
        )


def _say_done(run: ResolvedRun) -> int:
    _say(
        f"{run.run_dir}: all {run.config.num_steps} steps are done; evaluate or convert it, or choose "
        "another --run_dir"
    )
    return 0


def _save(engine: Engine, run: ResolvedRun, state: Mapping[str, Any], step: int) -> None:
    """A checkpoint, then what it makes superfluous goes. Collective."""
    is_lora = run.config.backbone.lora is not None
    save_checkpoint(engine, run.run_dir, step=step, state=state, trainable_only=is_lora)
    if engine_rank() == 0:
        remove_old_checkpoints(run.run_dir, keep_last=run.config.keep_last, keep_every=run.config.keep_every)


def _out_of_memory(run: ResolvedRun, error: torch.OutOfMemoryError) -> str:
    batch, first = run.config.batch, str(error).splitlines()[0]
    now = "chunk_size" if batch.chunk_size else "max_tokens_per_chunk"
    return (
        f"{first} Lower batch.{now} (now {getattr(batch, now)}; the result does not change) or "
        "processor.max_pixels, or use more ranks, or ds_configs/zero3_offload.json"
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
