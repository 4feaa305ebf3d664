"""A run's folder: whose it is, how far it got."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from agff.checkpoint import read_state
from agff.errors import CheckpointError, ConfigError
from data_pipeline.plan import plan_changes
from launcher.command_line import config_from_values
from launcher.config import ResolvedRun, RunConfig, as_dict, differences

CONFIG_FILE = "config.yaml"
DEEPSPEED_FILE = "deepspeed.json"


def check_run_folder(run: ResolvedRun) -> None:
    """Reads only. Raises ConfigError when the folder holds something else, or a run of another configuration."""
    folder = run.run_dir
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(f"{folder} exists and holds no run ({CONFIG_FILE} is missing); choose another --run_dir")
    changed = differences(_stored_values(folder), as_dict(run.config))
    changed += differences(_stored_deepspeed(folder), run.deepspeed, "deepspeed.")
    if changed:
        raise ConfigError(
            f"{folder} belongs to another configuration: {'; '.join(changed)}. "
            "Give the old settings to continue that run, or another --run_dir to start a new one"
        )


def check_data_plan(run: ResolvedRun, data_plan: Mapping[str, Any], *, step: int) -> None:
    """Whether the run can continue after `step` steps. Reads only.

    data_plan: `Plan.description`. Raises ConfigError when it was another one and data.accept_changes is not set.
    """
    folder = run.run_dir
    changed = plan_changes(read_state(folder, step)["data_plan"], data_plan)
    if changed and not run.config.data.accept_changes:
        raise ConfigError(
            f"{folder}: the order of the data changed since step {step}: {'; '.join(changed)}. Restore it to continue "
            "exactly, choose another --run_dir to start anew, or continue in the new order with --data.accept_changes true"
        )


def write_run_folder(run: ResolvedRun) -> None:
    """Record the final configuration, before the first step."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    (run.run_dir / CONFIG_FILE).write_text(yaml.safe_dump(as_dict(run.config), sort_keys=False))
    (run.run_dir / DEEPSPEED_FILE).write_text(json.dumps(run.deepspeed, indent=2) + "\n")


def read_run_config(folder: Path) -> RunConfig:
    """The configuration a run was started with. Raises CheckpointError when the folder is no run."""
    try:
        return config_from_values(_stored_values(folder))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no run folder ({CONFIG_FILE} is missing) and no release folder") from None


def _stored_values(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / CONFIG_FILE).read_text())


def _stored_deepspeed(folder: Path) -> dict[str, Any]:
    return json.loads((folder / DEEPSPEED_FILE).read_text())
