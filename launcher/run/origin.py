"""Where a release comes from, as its contract and its card say it: run, settings, data, backbone and its
licence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from agff.checkpoint_folder import read_state
from launcher.run.config import RunConfig, as_dict
from launcher.run.config_file import PATHS

NOT_RECORDED = "not recorded"
_SHOWN = ("num_steps", "batch.global_batch_size", "backbone.lora", "loss", "optimizer")
"""Settings, or groups of them, that say what was learned; the others are of the machine or in the
contract."""
_MAX_CHARACTERS = 200
"""Of what a backbone's folder says of its licence."""


def origin_of(run: Path, config: RunConfig, step: int) -> dict[str, Any]:
    """JSON values; no path of this machine is in them."""
    state, backbone = read_state(run, step), Path(config.backbone.path)
    plan = state.get("data_plan")
    return {
        "run": config.name,
        "objective": config.objective,
        "step": step,
        "seed": config.seed,
        "backbone": backbone.name,
        "backbone_sha256": state.get("backbone_sha256") or NOT_RECORDED,
        "backbone_license": backbone_license(backbone) or NOT_RECORDED,
        "settings": dict(_settings(as_dict(config))),
        "data": {
            name: {"samples": source["samples"], "shards": source["shards"]}
            for name, source in (plan["sources"].items() if isinstance(plan, Mapping) else ())
        },
    }


def backbone_license(folder: Path) -> str | None:
    """What the folder says: `license` in the front matter of its README.md, with its name where that is
    `other`; else the first line of its LICENSE file; None where it says nothing that can be read."""
    try:
        said = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        said = {}
    for name in ("license_name", "license") if said.get("license") == "other" else ("license",):
        if isinstance(said.get(name), str):
            return _one_line(said[name])
    files = sorted(path for path in folder.glob("*") if path.stem.upper() in ("LICENSE", "LICENCE"))
    for path in filter(Path.is_file, files):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        if first := next(filter(str.strip, lines), None):
            return _one_line(f"{first} ({path.name} beside the backbone)")
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_CHARACTERS] or NOT_RECORDED


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of _SHOWN settings that are set."""
    for name, value in values.items():
        dotted = prefix + name
        if isinstance(value, Mapping):
            yield from _settings(value, f"{dotted}.")
        elif value is not None and dotted not in PATHS and _is_shown(dotted):
            yield dotted, value


def _is_shown(dotted: str) -> bool:
    return any(dotted == shown or dotted.startswith(f"{shown}.") for shown in _SHOWN)
