"""What every test shares: a CPU, one thread, no compiled operators, no network; and the table of faults at
the end."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.campaign import CAMPAIGN

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a private folder: a lock left by a killed build elsewhere cannot stall the tests, and the tests can see that
# it stays empty
os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="agff-extensions-"))


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """A small MMEB-train download of four subsets."""
    from tests.drawings import write_drawings  # after the environment above: it imports torch

    return write_drawings(tmp_path / "drawings").mmeb


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = list(CAMPAIGN.lines())
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)
