"""Making the quickstart's data when a run names them and they are absent."""

from __future__ import annotations

import os
from pathlib import Path

from agff.files import locked
from data_pipeline.convert import prepare
from data_pipeline.manifest import MANIFEST_FILE
from launcher.quickstart import DEFAULT_OUT
from launcher.run.config import RunConfig

QUICKSTART_SHARDS = DEFAULT_OUT / "shards"
QUICKSTART_BACKBONE = DEFAULT_OUT / "backbone"


def prepare_quickstart_if_named(config: RunConfig) -> None:
    """Make the quickstart's drawings, backbone and shards when the run names them and they are absent.

    Ranks that call at once wait for the first one; all must see the same folder.
    """
    marks = {
        os.path.abspath(QUICKSTART_SHARDS / MANIFEST_FILE),
        os.path.abspath(QUICKSTART_BACKBONE / "config.json"),
    }
    named = {  # a stored configuration names them absolute
        os.path.abspath(Path(config.data.shards) / MANIFEST_FILE),
        os.path.abspath(Path(config.backbone.path) / "config.json"),
    }
    if all(map(os.path.exists, named & marks)):
        return
    from launcher.quickstart.assemble import prepare_quickstart

    DEFAULT_OUT.mkdir(parents=True, exist_ok=True)
    with locked(DEFAULT_OUT / ".shards.lock"):
        paths = prepare_quickstart(DEFAULT_OUT)
        prepare(paths.mmeb, QUICKSTART_SHARDS)
