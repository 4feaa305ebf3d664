"""Ranks that `doctor` starts on this machine: they all-reduce and take a step of every ZeRO stage."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.checks.finding import Finding, last_lines

PROJECT = Path(__file__).resolve().parents[2]
_OF_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "TORCHELASTIC_")
"""Variables of the job that doctor runs in; its own ranks are none of that job's."""


def check_ranks(
    *,
    num_ranks: int = 2,
    on_gpus: bool = False,
    environ: Mapping[str, str] = os.environ,
    limit_s: float = 120,
    log_folder: Path | None = None,
) -> list[Finding]:
    """Start ranks on this machine that all-reduce and take a step of three chunks under ZeRO-1, 2 and 3, on
    GPUs in bf16 where they have it. None of them outlives the call.

    log_folder: where the whole output of a rank that failed is kept; the folder for temporary files unless
    given.
    """
    from launcher.run.ranks import free_port

    what = f"{num_ranks} on {'GPUs over NCCL' if on_gpus else 'the CPU over gloo (NCCL untried)'}"
    base = {name: value for name, value in environ.items() if not name.startswith(_OF_LAUNCHERS)}
    base |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
    }
    base["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), environ.get("PYTHONPATH")]))
    base |= {"DS_ACCELERATOR": "cuda"} if on_gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-c",
        f"from {__name__} import step_on_this_rank; step_on_this_rank({limit_s})",
    ]
    start = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(num_ranks)]
        try:
            for rank, output in enumerate(outputs):
                own = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with output.open("wb") as file:
                    process = subprocess.Popen(
                        command,
                        env=own,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                processes.append(process)
            failed = _first_failure(processes, start + limit_s)
        finally:
            for process in processes:
                _end(process)
        seconds = time.monotonic() - start
        if failed is None:
            did = f"all-reduce and a step of three chunks under ZeRO-1, 2 and 3 in {seconds:.0f} s"
            return [Finding("ok", "ranks", f"{what}: {did}")]
        code, text = processes[failed].returncode, outputs[failed].read_text(errors="replace")
        how = (
            f"not done within {limit_s:.0f} s"
            if seconds >= limit_s
            else f"rank {failed} ended with code {code}"
        )
        found = f"{what}: {how}: {last_lines(text, 3) or 'it printed nothing'}"
        log = (log_folder or Path(tempfile.gettempdir())) / f"doctor-rank-{failed}.log"
        log.write_text(text)
        remedy = (
            f"fix the errors above, if any; else: less {log}; with NCCL_DEBUG=INFO before the command it "
            "says more"
        )
        return [Finding("error", "ranks", found, remedy)]


def _first_failure(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> int | None:
    """The rank that failed first, or one that was not done in time; None when all are done."""
    while True:
        codes = [process.poll() for process in processes]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the rank and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def step_on_this_rank(limit_s: float) -> None:
    """What each rank of `check_ranks` does. Collective. It ends by itself, also when doctor was killed."""
    signal.alarm(int(limit_s) + 10)
    # DeepSpeed calls collectives by names that torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch
    import torch.distributed as dist

    from agff.engine import start_process_group

    device = start_process_group(int(os.environ["LOCAL_RANK"]))
    try:
        total = torch.full((1000,), float(dist.get_rank() + 1), device=device)
        dist.all_reduce(total)
        expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
        if not bool((total == expected).all()):
            raise AssertionError(f"all-reduce gave {float(total[0])}, not {expected}")
        for stage in (1, 2, 3):
            _step_under_zero(stage, device)
    finally:
        dist.destroy_process_group()


def _step_under_zero(stage: int, device: Any) -> None:
    """The gradient of three chunks must have the length that plain autograd gives it: DeepSpeed's streams, of
    which a CPU has none, must not read or reduce one too early."""
    import torch

    from agff.engine import Engine
    from agff.optimizer import OptimizerConfig

    is_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    rows = torch.ones(4, 64)
    expected = torch.cat(
        [
            part.flatten()
            for part in torch.autograd.grad(model(rows).square().mean(), list(model.parameters()))
        ]
    ).norm()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 1000},
        "bf16": {"enabled": is_bf16},
        "steps_per_print": 10**9,
    }
    if stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    engine = Engine(
        model.bfloat16() if is_bf16 else model,
        deepspeed_config=config,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant_with_warmup"),
        num_steps=1,
        autocast_dtype=None,
        device=device,
    )
    rows = rows.to(device, next(model.parameters()).dtype)
    for index in range(3):
        engine.backward(engine.deepspeed(rows).float().square().mean(), index == 2)
    if not engine.step():
        raise AssertionError(f"ZeRO-{stage} skipped the step: its gradient was not finite")
    ratio = engine.gradient_norm / (3 * float(expected))
    if abs(ratio - 1) > 0.02:  # bf16 rounds to 0.4 %
        raise AssertionError(
            f"ZeRO-{stage} on {device}: the gradient is {ratio:.3f} times as long as it should"
        )
