"""Held-out shards beside the small project's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.convert import prepare
from tests.drawings import write_drawings


@pytest.fixture(scope="session")
def held_out(project: Path) -> Path:
    """Shards of the same sources as the project's, of other scenes."""
    drawings = write_drawings(project / "held_out_data", seed=1)
    prepare(drawings.mmeb, project / "held_out")
    return project / "held_out"
