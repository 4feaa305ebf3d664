"""Where the checks of this folder run, and the table they fill.

`make test-gpu`: on all visible GPUs over NCCL, bf16, real widths. Without it: the same code on two CPU ranks
over gloo with tiny widths, so that none of it is untested; the figures then mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.findings import Findings
from tests.gpu.where import Where


@pytest.fixture(scope="session")
def where() -> Where:
    if os.environ.get("DS_ACCELERATOR") != "cuda":
        return Where(on_gpus=False, num_ranks=2)
    import torch

    if not torch.cuda.is_available():
        pytest.skip(
            f"torch {torch.__version__} finds no GPU here; `make test-gpu` is for a machine that has one"
        )
    return Where(on_gpus=True, num_ranks=torch.cuda.device_count())


@pytest.fixture(scope="session")
def findings(where: Where, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Findings]:
    """Written when the session ends."""
    found = Findings(where)
    yield found
    found.write(Path(".cache/gpu") if where.on_gpus else tmp_path_factory.mktemp("gpu"))
