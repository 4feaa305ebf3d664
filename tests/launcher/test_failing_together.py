"""An error of one rank ends all of them soon, with its message first; a stalled rank is named."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.launcher.runs import misbehaving, run_command, train_command

pytestmark = pytest.mark.timeout(300)


def run(project: Path, deed: str, options: str = "") -> tuple[int, str, float]:
    """(exit code, output, seconds) of a run whose rank 1 does the deed in step 2."""
    command = misbehaving(f"{train_command(2)} --run_dir runs/together {options}", project, step=2, deed=deed)
    started = time.monotonic()
    result = run_command(f"rm -rf runs/together; {command}", project)
    return result.returncode, result.stdout, time.monotonic() - started


def test_an_exception_on_one_rank_ends_all_with_its_words_first(project: Path) -> None:
    """Nor may it leave the process group in good order first: with NCCL that can wait for the others."""
    waits = "torch.distributed.destroy_process_group = lambda: time.sleep(200)"
    code, output, seconds = run(project, f'{waits}; raise RuntimeError("the roof fell in")')
    assert code != 0
    assert seconds < 100
    failures = re.findall(r"^error on rank (\d) \(.*\):", output, flags=re.MULTILINE)
    assert failures[0] == "1"
    assert "RuntimeError: the roof fell in" in output


def test_too_little_memory_on_one_rank_says_which_knob_to_turn(project: Path) -> None:
    code, output, _ = run(
        project, 'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")'
    )
    assert code != 0
    assert "error on rank 1" in output
    assert "Tried to allocate 2.00 GiB. Lower batch.chunk_size (now 2; the result does not change)" in output


def test_a_stalled_rank_is_named_with_its_stack(project: Path) -> None:
    code, output, _ = run(project, "time.sleep(8)", "--stalled_step_s 3")
    assert code == 0, output
    assert "rank 1 is stalled: in step 2 for" in output
    stack = output.partition("rank 1 is stalled")[2]
    assert re.search(r"train_[0-9a-f]{8}.py.* in train_step", stack)
