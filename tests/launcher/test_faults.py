"""A campaign of faults against whole runs: each ends in a state from which the same command reaches the same weights.

In `make test-full`; every case prints a line "FAULTS name: N faults, M survived".
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launcher.runs import Started, run_command, train_command
from tests.launcher.test_train import assert_same_tensors, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

NUM_STEPS = 10
LAST = f"checkpoints/step-{NUM_STEPS:06d}"
ENDS_WITHIN_S = 120
"""Of a fault: then no process of the run may be left."""


def command_of(stage: int, run: Path) -> str:
    return f"{train_command(stage)} --num_steps {NUM_STEPS} --save_every 1 --run_dir {run}"


@pytest.fixture(scope="module")
def expected(project: Path) -> dict[int, dict[str, Any]]:
    """By ZeRO stage: the last checkpoint of an unbroken run."""
    found = {}
    for stage in (1, 2, 3):
        run = project / f"runs/faultless{stage}"
        result = run_command(command_of(stage, run), project)
        assert result.returncode == 0, result.stdout
        found[stage] = tensors_of(run / LAST)
    return found


def tell(capsys: pytest.CaptureFixture[str], name: str, faults: int, survived: int) -> None:
    with capsys.disabled():
        print(f"\nFAULTS {name}: {faults} faults, {survived} survived")


def finish(stage: int, run: Path, project: Path, expected: dict[str, Any]) -> None:
    """The same command, undisturbed, ends with the same weights."""
    result = run_command(command_of(stage, run), project)
    assert result.returncode == 0, result.stdout
    assert_same_tensors(tensors_of(run / LAST), expected)


def steps_saved(run: Path) -> int:
    names = [path.name for path in (run / "checkpoints").glob("step-??????")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_random_ranks_killed_at_random_steps(
    project: Path, expected: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    generator = random.Random(stage)
    kills, series = 0, 0
    while kills < 10:
        series += 1
        run = project / f"runs/kills{stage}-{series}"
        kills_of_run = 0
        for _ in range(4):
            done = steps_saved(run)
            if done >= NUM_STEPS - 1:
                break
            started = Started(command_of(stage, run), project)
            target = generator.randint(done, NUM_STEPS - 2)
            started.wait_until(lambda target=target, run=run: steps_saved(run) >= target and (run / "config.yaml").exists())
            time.sleep(generator.random() * 0.5)
            generator.choice(started.ranks()).kill()
            assert started.end(ENDS_WITHIN_S) != 0
            kills_of_run += 1
        finish(stage, run, project, expected[stage])
        kills += kills_of_run
        shutil.rmtree(run)
    tell(capsys, f"kill -9 of a random rank, ZeRO-{stage}", kills, kills)


@pytest.mark.parametrize("stage", [1, 3])
def test_all_ranks_killed_while_they_save(
    project: Path, expected: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    run = project / f"runs/save{stage}"
    faults = 0
    for save in (1, 3, 5):
        started = Started(command_of(stage, run), project)
        partial = run / f"checkpoints/step-{save:06d}.partial"
        started.wait_until(partial.exists)
        for rank in started.ranks():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        assert started.end(ENDS_WITHIN_S) != 0
        faults += 1
    finish(stage, run, project, expected[stage])
    tell(capsys, f"kill -9 of all ranks while they save, ZeRO-{stage}", faults, faults)


def test_a_disk_that_is_full_while_they_save(
    project: Path, expected: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        started = Started(command_of(3, disk / "run"), project)
        assert started.end(240) != 0
        assert 0 < steps_saved(disk / "run") < NUM_STEPS
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        finish(3, disk / "run", project, expected[3])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    tell(capsys, "disk full while they save", 1, 1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_asked_to_stop_again_and_again(
    project: Path, expected: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    run = project / f"runs/asked-{number.name}"
    faults = 0
    for target in (2, 5, 7):
        started = Started(command_of(2, run), project)
        started.wait_until(lambda target=target: steps_saved(run) >= target)
        for rank in started.ranks():
            rank.send_signal(number)
        assert started.end(ENDS_WITHIN_S) == 75
        faults += 1
    finish(2, run, project, expected[2])
    tell(capsys, f"{number.name} to all ranks", faults, faults)


def test_the_link_between_two_ranks_is_cut(
    project: Path, expected: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two network namespaces with a cable between them: both ranks must end within their timeout, and the run continue."""
    name = f"agff{os.getpid() % 10000}"
    setup = [
        f"ip netns add {name}a",
        f"ip netns add {name}b",
        f"ip link add {name}x netns {name}a type veth peer name {name}y netns {name}b",
        f"ip -n {name}a addr add 10.97.0.1/24 dev {name}x",
        f"ip -n {name}b addr add 10.97.0.2/24 dev {name}y",
        *(
            f"ip -n {name}{side} link set {device} up"
            for side in "ab"
            for device in ("lo", f"{name}{'x' if side == 'a' else 'y'}")
        ),
    ]
    if not shutil.which("ip") or subprocess.run(setup[0].split(), check=False, capture_output=True).returncode:
        pytest.skip("network namespaces need root and iproute2")
    run = project / "runs/cut"
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for line in setup[1:]:
            subprocess.run(line.split(), check=True)
        for rank, side in enumerate("ab"):
            environment = {
                **os.environ,
                "PYTHONPATH": str(project),
                "DS_ACCELERATOR": "cpu",
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "10.97.0.1",
                "MASTER_PORT": "29511",
                "GLOO_SOCKET_IFNAME": f"{name}{'x' if side == 'a' else 'y'}",
            }
            line = (
                "exec python launcher/train.py --deepspeed ds_configs/zero2.json --collective_timeout_s 20 "
                f"--num_steps {NUM_STEPS} --save_every 1 --run_dir {run}"
            )
            ranks.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", f"{name}{side}", "bash", "-c", line],
                    cwd=project,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        deadline = time.monotonic() + 120
        while steps_saved(run) < 3:
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.02)
        subprocess.run(f"ip -n {name}b link set {name}y down".split(), check=True)
        assert [rank.wait(timeout=ENDS_WITHIN_S) != 0 for rank in ranks] == [True, True]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for side in "ab":
            subprocess.run(["ip", "netns", "del", f"{name}{side}"], check=False)
    assert steps_saved(run) < NUM_STEPS
    finish(2, run, project, expected[2])
    tell(capsys, "network cut between two ranks", 1, 1)
