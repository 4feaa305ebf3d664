"""A project folder in small: our own drawings, the tiniest backbone, and commands run as a person types
them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from agff.checkpoint_folder import checkpoint_folder, checkpoint_name
from data_pipeline.convert import prepare
from tests.drawings import tiny_backbone, write_drawings

MARK = "AGFF_TEST_RUN"
"""Environment variable by which the processes of one command are found again."""
REPOSITORY = Path(__file__).parents[2]
SMALL_RECIPE = {
    "name": "quickstart",
    "deepspeed": "zero3",
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
    """A copy of the packages whose quickstart is 4 steps on drawings; run commands with it as working
    folder."""
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


def change_settings(run: Path, section: str, **values: object) -> None:
    """Of a run that has trained: its configuration says other values, as if somebody had edited it."""
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings[section] |= values
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def universal_of(run: Path, out: Path, *, step: int) -> Path:
    """The universal checkpoint that DeepSpeed makes of that of a step."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint_folder(run) / checkpoint_name(step))]
    command += ["--output_folder", str(out), "--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return out


MISBEHAVING = """
import sys
import time

import torch

import agff.trainer
from launcher import train

right = agff.trainer.train_step


def train_step(engine, *arguments):
    if engine.deepspeed.global_steps + 1 == STEP and engine.deepspeed.global_rank == 1:
        DEED
    return right(engine, *arguments)


agff.trainer.train_step = train_step
sys.exit(train.main())
"""


def misbehaving(command: str, folder: Path, *, step: int, deed: str) -> str:
    """The command, with a `launcher/train.py` whose rank 1 does `deed` (Python) at the beginning of that
    step."""
    name = f"train_{zlib.crc32(deed.encode()):08x}.py"
    (folder / "launcher" / name).write_text(MISBEHAVING.replace("STEP", str(step)).replace("DEED", deed))
    return command.replace("train.py", name)


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


class Started:
    """A command that runs beside the test, and all the processes that came of it."""

    def __init__(self, command: str, folder: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=_environment(folder, self._mark),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float = 120) -> None:
        """Fails when the command ends before, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            assert self._process.poll() is None, "it ended too early"
            time.sleep(0.005)

    def processes(self) -> list[psutil.Process]:
        return [candidate for candidate in psutil.process_iter() if _is_marked(candidate, self._mark)]

    def ranks(self) -> list[psutil.Process]:
        """The training processes that run by now, without their loaders' workers (which may have the name of
        their rank)."""
        named = {}
        for candidate in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                if candidate.name().startswith("agff rank"):
                    named[candidate] = candidate.parent()
        return [candidate for candidate, parent in named.items() if parent not in named]

    def end(self, timeout_s: float) -> int:
        """Exit code; nothing may be left behind. A loader's worker looks every 5 s whether its rank is still
        there."""
        code = self._process.wait(timeout=timeout_s)
        _, left_behind = psutil.wait_procs(self.processes(), timeout=15)
        assert not left_behind, f"left behind: {left_behind}"
        return code


def signal_when_saved(
    command: str,
    folder: Path,
    run: Path,
    *,
    victims: str,
    number: signal.Signals = signal.SIGKILL,
    timeout_s: float = 120,
) -> int:
    """Start the command and, after its second checkpoint, send a signal; wait for its end and return its exit
    code.

    victims: "all" processes, the "ranks" with their workers (as Slurm does), "one rank" alone, or one
    "worker".
    """
    started = Started(command, folder)
    started.wait_until(lambda: len(list((run / "checkpoints").glob("step-??????"))) >= 2)
    ranks = started.ranks()
    assert ranks, "no rank found"
    programs = [" ".join(process.cmdline()) for process in started.processes()]
    assert sum("deepspeed.launcher.launch" in program for program in programs) == 1, "one chain of launchers"
    workers = [child for rank in ranks for child in rank.children()]
    everything = {
        "all": started.processes(),
        "ranks": ranks + workers,
        "one rank": ranks[1:],
        "worker": workers[:1],
    }
    for victim in everything[victims]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
    return started.end(timeout_s)


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
