"""A project folder in small: our own drawings, the tiniest backbone, and commands run as a person types them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sysconfig
import time
import uuid
from pathlib import Path

import psutil
import yaml

from launcher.prepare import prepare
from tests.drawings import tiny_backbone, write_drawings

MARK = "AGFF_TEST_RUN"
"""Environment variable by which the processes of one command are found again."""
REPOSITORY = Path(__file__).parents[2]
SMALL_RECIPE = {
    "name": "quickstart",
    "num_steps": 4,
    "save_every": 2,
    "backbone": {"path": ".cache/quickstart/backbone"},
    "processor": {"max_tokens": 96},
    "loss": {"temperature": 0.05, "bidirectional": True},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
    "batch": {"global_batch_size": 8, "chunk_size": 2},
    "data": {"shards": ".cache/quickstart/shards", "sub_batch_size": 4},
}


def small_project(folder: Path) -> Path:
    """A copy of the packages whose quickstart is 4 steps on drawings; run commands with it as working folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("agff", "data_pipeline", "launcher", "ds_configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    cache = folder / ".cache" / "quickstart"
    drawings = write_drawings(cache / "data")
    tiny_backbone(cache / "backbone")
    prepare(drawings.mmeb, cache / "shards")
    (folder / "launcher" / "recipes" / "quickstart.yaml").write_text(yaml.safe_dump(SMALL_RECIPE))
    return folder


def train_command(stage: int) -> str:
    """As the README has it."""
    return f"deepspeed launcher/train.py --deepspeed ds_configs/zero{stage}.json"


def run_command(command: str, folder: Path, *, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    """Run a shell line of the README in `folder`; both streams in `stdout`."""
    environment = _environment(folder, mark := uuid.uuid4().hex)
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    left_behind = [process.cmdline() for process in psutil.process_iter() if _is_marked(process, mark)]
    assert not left_behind, f"{command} left processes behind: {left_behind}"
    return result


def signal_when_saved(
    command: str, folder: Path, run: Path, *, victims: str, number: signal.Signals = signal.SIGKILL, timeout_s: float = 120
) -> int:
    """Start the command and, after its second checkpoint, send a signal; wait for its end and return its exit code.

    victims: "all" processes, the "ranks" with their workers (as Slurm does), "one rank" alone, or one "worker".
    """
    environment = _environment(folder, mark := uuid.uuid4().hex)
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + timeout_s
    while len(list((run / "checkpoints").glob("step-??????"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    marked = [candidate for candidate in psutil.process_iter() if _is_marked(candidate, mark)]
    ranks = [candidate for candidate in marked if "--local_rank" in " ".join(candidate.cmdline())]
    ranks = [candidate for candidate in ranks if candidate.parent() not in ranks]  # a worker has the words of its rank
    workers = [child for candidate in ranks for child in candidate.children()]
    assert ranks, "no rank found"
    chosen = {"all": marked, "ranks": ranks + workers, "one rank": ranks[1:], "worker": workers[:1]}[victims]
    for candidate in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            candidate.send_signal(number)
    code = process.wait(timeout=timeout_s)
    for candidate in psutil.process_iter():
        assert not _is_marked(candidate, mark), f"left behind: {candidate.cmdline()}"
    return code


def _environment(folder: Path, mark: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        MARK: mark,
    }


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
