"""Releases in libraries that know nothing of us: run by `make test-ecosystem`, in an environment without this
project's dependencies. The releases are written by the environment that has them, as a user would get them.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
collect_ignore_glob = [] if find_spec("torchvision") and find_spec("sentence_transformers") else ["test_*.py"]


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FAMILY-full and FAMILY-lora: release/, items.json, images, vectors.safetensors."""
    folder = tmp_path_factory.mktemp("releases")
    python = os.environ.get("AGFF_PYTHON", str(ROOT / ".venv/bin/python"))
    subprocess.run([python, "-m", "tests.ecosystem.write_releases", str(folder)], cwd=ROOT, check=True)
    return folder
