"""Several ranks on a machine without accelerators, where DeepSpeed's launcher starts only one by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from launcher.run.ranks import free_port


def start_cpu_ranks(num_ranks: int, program: str, argv: Sequence[str]) -> NoReturn:
    """Become DeepSpeed's launcher, which runs the program with that many ranks."""
    arguments = [a for a in argv if not a.startswith("--local_rank")]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    command += ["--num_accelerators", str(num_ranks)]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    sys.stdout.flush()
    os.execv(sys.executable, [*command, program, *arguments])
