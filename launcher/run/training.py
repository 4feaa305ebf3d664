"""Training on one rank: from the process group to the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import AutoConfig

from agff.checkpoint import newest_intact_step, restore_checkpoint, save_checkpoint
from agff.checkpoint_folder import remove_old_checkpoints, remove_unfinished
from agff.collectives import rank as engine_rank
from agff.engine import Engine, start_process_group
from agff.errors import TrainingError
from agff.flops import ModelFlops
from agff.processor import ItemProcessor
from agff.trainer import train
from launcher.run.backbone_identity import backbone_of_run
from launcher.run.chunk_search import CHUNK_FILE, resolve_chunks
from launcher.run.config import ResolvedRun
from launcher.run.config_file import write_run_config
from launcher.run.data import RunData, check_shards_together
from launcher.run.first_stage import backbone_folder
from launcher.run.folder import (
    check_data_plan,
    check_run_folder_together,
    hold_run_folder,
)
from launcher.run.log import RunLog
from launcher.run.model import build_model
from launcher.run.parameter_gathers import with_gathers_logged
from launcher.run.ranks import RankInfo
from launcher.run.speed import SpeedMeter
from launcher.run.stop_request import StopRequest
from launcher.run.watchdog import Watchdog
from launcher.validation.history import History, open_history
from launcher.validation.sets import ValidationSets, check_sets_together
from launcher.validation.validator import Validator, is_missing

Outcome = Literal["trained", "nothing left", "stopped"]


def train_on_this_rank(
    run: ResolvedRun,
    data: RunData,
    sets: ValidationSets | None,
    processor: ItemProcessor,
    rank: RankInfo,
) -> Outcome:
    """Train the rest of the run, and leave the process group. Collective.

    `rank` must be exported (launcher/run/ranks.py). A SIGTERM or SIGUSR1 stops all ranks after a save.
    """
    stop = StopRequest()
    stop.listen()
    try:
        return _train(run, data, sets, processor, rank, stop)
    except torch.OutOfMemoryError as error:
        raise TrainingError(_out_of_memory(run, error)) from None


def _train(
    run: ResolvedRun,
    data: RunData,
    sets: ValidationSets | None,
    processor: ItemProcessor,
    rank: RankInfo,
    stop: StopRequest,
) -> Outcome:
    device = start_process_group(rank.local_rank, timeout_s=run.config.collective_timeout_s)
    check_shards_together(data, hashes=run.config.data.check_hashes)
    with hold_run_folder(run.run_dir, patience_s=min(120.0, run.config.collective_timeout_s / 2)):
        check_run_folder_together(run)  # another job may have begun a run here since
        if rank.rank == 0:
            remove_unfinished(run.run_dir)
        start_step = newest_intact_step(run.run_dir, device=device) or 0
        history = open_history(run, sets, start_step=start_step)
        had_work_left = start_step < run.config.num_steps or is_missing(history, run, start_step)
        is_done = not had_work_left or _train_from(
            start_step, run, data, history, processor, rank, device, stop
        )
        dist.barrier()
        stop.ignore()
    dist.destroy_process_group()
    if not had_work_left:
        return "nothing left"
    return "trained" if is_done else "stopped"


def _train_from(
    start_step: int,
    run: ResolvedRun,
    data: RunData,
    history: History | None,
    processor: ItemProcessor,
    rank: RankInfo,
    device: torch.device,
    stop: StopRequest,
) -> bool:
    """The rest of the run; False when stopped on request. Collective."""
    config = run.config
    lengths: list[list[int]] = []
    if history is not None:
        lengths = check_sets_together(run, history.sets, processor, hashes=config.data.check_hashes)
    if start_step:
        check_data_plan(run, data.description, step=start_step)
    state = {
        "data_plan": data.description,
        "backbone_sha256": backbone_of_run(run, start_step=start_step),
    }
    if rank.rank == 0:
        write_run_config(run)
    build = partial(_build_engine, processor=processor, device=device)
    run = resolve_chunks(run, data.step_batches(run, processor, rank=rank.rank), build)
    engine = build(run)
    torch.manual_seed(config.seed + 1 + rank.rank)  # dropout differs between ranks, weights do not
    trainable_only = config.backbone.lora is not None
    if start_step:
        restore_checkpoint(engine, run.run_dir, step=start_step, trainable_only=trainable_only)
    observer = RunLog(
        run.run_dir,
        measure_speed=_speed_meter(run, engine).measure,
        start_step=start_step,
        num_steps=config.num_steps,
        log_every=config.log_every,
        log_samples=config.log_samples,
        spike_deviations=config.loss_spike_deviations,
    )
    batches = data.batches(run, processor, rank=rank.rank, start_step=start_step)
    with observer, closing(batches), Watchdog(rank.rank, after_s=config.stalled_step_s) as watchdog:
        validator = None
        if history is not None:
            validator = Validator(
                run,
                engine,
                processor,
                history,
                lengths,
                report=observer.validated,
                mark=watchdog.mark,
                should_stop=lambda: bool(stop),
            )
            validator.before_steps(start_step)
        is_done = train(
            engine,
            config.loss,
            config.fusion,
            batches,
            start_step=start_step,
            num_steps=config.num_steps,
            save_every=config.save_every,
            max_skipped_in_a_row=config.max_skipped_in_a_row,
            observe=with_gathers_logged(observer, engine.gathers),
            save=partial(_save, engine, run, state, history),
            after_step=validator.after_step if validator is not None else _nothing,
            should_stop=lambda: bool(stop),
            mark=watchdog.mark,
        )
    return is_done and not (validator is not None and validator.was_cut_short)


def _build_engine(run: ResolvedRun, *, processor: ItemProcessor, device: torch.device) -> Engine:
    """A model with the weights that the run begins with, under ZeRO. Collective."""
    config = run.config
    torch.manual_seed(config.seed)
    return Engine(
        build_model(run, processor),
        deepspeed_config=run.deepspeed,
        optimizer=config.optimizer,
        num_steps=config.num_steps,
        autocast_dtype=run.autocast_dtype,
        device=device,
        keep_vision=config.batch.keep_vision,
        first_pass_chunks=config.batch.first_pass_chunks,
    )


def _speed_meter(run: ResolvedRun, engine: Engine) -> SpeedMeter:
    config = run.config
    model_config = AutoConfig.from_pretrained(backbone_folder(config.backbone.path), local_files_only=True)
    flops = ModelFlops.of_config(
        model_config,
        config.backbone,
        config.prompts,
        keeps_vision=config.batch.keep_vision != "off",
        first_pass_chunks=engine.first_pass_chunks,
    )
    return SpeedMeter.of_device(flops, engine.device, run.precision, memory=engine.feature_memory)


def _nothing(step: int) -> None:
    """After a step of a run without validation."""


def _save(
    engine: Engine, run: ResolvedRun, state: Mapping[str, Any], history: History | None, step: int
) -> None:
    """A checkpoint, then what it makes superfluous goes. Collective."""
    is_lora = run.config.backbone.lora is not None
    save_checkpoint(engine, run.run_dir, step=step, state=state, trainable_only=is_lora)
    if engine_rank() == 0:
        best = history.best_step() if history is not None else None
        keep_last, keep_every = run.config.keep_last, run.config.keep_every
        remove_old_checkpoints(run.run_dir, keep_last=keep_last, keep_every=keep_every, best=best)


def _out_of_memory(run: ResolvedRun, error: torch.OutOfMemoryError) -> str:
    batch, first = run.config.batch, str(error).splitlines()[0]
    now = "chunk_size" if batch.chunk_size else "max_tokens_per_chunk"
    lower = f"Lower batch.{now} (now {getattr(batch, now)}; the result does not change)"
    if batch.chunk_size == "auto":
        lower = f"Lower `rows` in {run.run_dir / CHUNK_FILE} (the result does not change)"
    return f"{first} {lower} or processor.max_pixels, or use more ranks, or ds_configs/zero3_offload.json"
