"""A campaign of faults against whole runs: each ends in a state from which the same command reaches the same
weights.

In `make test-full`, which prints what was made and survived at its end; tests/slurm adds preemptions and lost
nodes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from launcher.run.stop_request import EXIT_CODE
from tests.campaign import CAMPAIGN
from tests.launcher.runs import Started, misbehaving, run_command, train_command
from tests.launcher.test_train import assert_same_tensors, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

NUM_STEPS = 16
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
    project: Path, expected: dict[int, dict[str, Any]], stage: int
) -> None:
    generator = random.Random(stage)
    kills = 0
    while kills < 10:
        run = project / f"runs/kills{stage}-{kills}"
        with CAMPAIGN.against(f"kill -9 of a random rank at a random moment, ZeRO-{stage}") as fault:
            for _ in range(4):
                done = steps_saved(run)
                if done >= NUM_STEPS - 5:
                    break
                started = Started(command_of(stage, run), project)
                target = generator.randint(done, NUM_STEPS - 5)
                started.wait_until(
                    lambda target=target, run=run, started=started: (
                        steps_saved(run) >= target and len(started.ranks()) == 2
                    )
                )
                time.sleep(generator.random() * 0.5)
                generator.choice(started.ranks()).kill()
                fault()
                kills += 1
                assert started.end(ENDS_WITHIN_S) != 0
            finish(stage, run, project, expected[stage])
        shutil.rmtree(run)


@pytest.mark.parametrize("stage", [1, 3])
def test_all_ranks_killed_while_they_save(
    project: Path, expected: dict[int, dict[str, Any]], stage: int
) -> None:
    run = project / f"runs/save{stage}"
    interrupted = 0
    with CAMPAIGN.against(f"kill -9 of all ranks while they save, ZeRO-{stage}") as fault:
        for save in (1, 3, 5):
            started = Started(command_of(stage, run), project)
            started.wait_until(lambda started=started: len(started.ranks()) == 2)
            ranks = started.ranks()
            partial = run / f"checkpoints/step-{save:06d}.partial"
            started.wait_until(partial.exists)
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
            fault()
            assert started.end(ENDS_WITHIN_S) != 0
            interrupted += partial.exists()
        assert interrupted, "some came before the rename"
        finish(stage, run, project, expected[stage])


def test_a_disk_that_is_full_while_they_save(
    project: Path, expected: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with CAMPAIGN.against("disk full while they save, ZeRO-3") as fault:
            fault()
            started = Started(command_of(3, disk / "run"), project)
            assert started.end(240) != 0
            assert 0 < steps_saved(disk / "run") < NUM_STEPS
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            finish(3, disk / "run", project, expected[3])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_asked_to_stop_again_and_again(
    project: Path, expected: dict[int, dict[str, Any]], number: signal.Signals
) -> None:
    run = project / f"runs/asked-{number.name}"
    with CAMPAIGN.against(f"{number.name} to all ranks, ZeRO-2") as fault:
        for target in (2, 5, 7):
            started = Started(command_of(2, run), project)
            started.wait_until(lambda target=target: steps_saved(run) >= target)
            for rank in started.ranks():
                rank.send_signal(number)
            fault()
            assert started.end(ENDS_WITHIN_S) == EXIT_CODE
        finish(2, run, project, expected[2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("stage", "damage"), [(1, flip_a_bit), (2, Path.unlink), (3, cut_short)])
def test_the_newest_checkpoint_is_damaged(
    project: Path, expected: dict[int, dict[str, Any]], stage: int, damage: Callable[[Path], None]
) -> None:
    run = project / f"runs/damaged{stage}"
    shutil.copytree(project / f"runs/faultless{stage}", run)
    with CAMPAIGN.against(f"newest checkpoint damaged ({damage.__name__}), ZeRO-{stage}") as fault:
        damage(next((run / LAST).glob("*optim_states.pt")))
        fault()
        finish(stage, run, project, expected[stage])


POISONED_STEP = 4
A_NAN = 'batch.chunks[0]["pixel_values"][0, 0] = float("nan")'


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_computes_a_nan(project: Path, stage: int) -> None:
    """That step changes nothing; and a run that had one, was killed and went on, ends as one that had it and
    was not."""
    runs = [project / f"runs/nan{stage}-{name}" for name in ("whole", "killed")]
    whole, killed = (
        misbehaving(f"{command_of(stage, run)} --keep_last 99", project, step=POISONED_STEP, deed=A_NAN)
        for run in runs
    )
    with CAMPAIGN.against(f"NaN in one rank's gradient, ZeRO-{stage}") as fault:
        result = run_command(whole, project)
        fault()
        assert result.returncode == 0, result.stdout
        assert f"step {POISONED_STEP} skipped on all ranks: the gradient was not finite" in result.stdout
        before, after, later = (
            {
                name: value
                for name, value in tensors_of(runs[0] / f"checkpoints/step-{step:06d}").items()
                if isinstance(value, torch.Tensor) and not name.startswith("random")
            }
            for step in (POISONED_STEP - 1, POISONED_STEP, POISONED_STEP + 1)
        )
        assert sum(value.numel() for value in before.values()) > 3 * 100_000, (
            "weights and both moments of Adam"
        )
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert [name for name in before if not torch.equal(before[name], later[name])] != []
        started = Started(killed, project)
        started.wait_until(lambda: steps_saved(runs[1]) >= POISONED_STEP)
        started.ranks()[0].kill()
        assert started.end(ENDS_WITHIN_S) != 0
        result = run_command(killed, project)
        assert result.returncode == 0, result.stdout
        assert_same_tensors(tensors_of(runs[1] / LAST), tensors_of(runs[0] / LAST))


def test_the_link_between_two_ranks_is_cut(project: Path, expected: dict[int, dict[str, Any]]) -> None:
    """Two network namespaces with a cable between them: both ranks must end within their timeout, and the run
    continue."""
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
    if (
        not shutil.which("ip")
        or subprocess.run(setup[0].split(), check=False, capture_output=True).returncode
    ):
        pytest.skip("network namespaces need root and iproute2")
    run = project / "runs/cut"
    ranks: list[subprocess.Popen[bytes]] = []
    with CAMPAIGN.against("network cut between two ranks, ZeRO-2") as fault:
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
                    "exec python launcher/train.py --deepspeed ds_configs/zero2.json --collective_timeout_s "
                    f"20 --num_steps {NUM_STEPS} --save_every 1 --run_dir {run}"
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
            fault()
            assert [rank.wait(timeout=ENDS_WITHIN_S) != 0 for rank in ranks] == [True, True]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
            for side in "ab":
                subprocess.run(["ip", "netns", "del", f"{name}{side}"], check=False)
        assert steps_saved(run) < NUM_STEPS
        finish(2, run, project, expected[2])
