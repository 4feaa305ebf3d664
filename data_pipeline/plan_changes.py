"""What differs between the data of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plan_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions (launcher/run/data.py), one line each; empty for equal data in
    an equal order."""
    names = ("version", "seed", "global_batch_size", "sub_batch_size")
    changes = [f"{name}: {old[name]} -> {new[name]}" for name in names if old[name] != new[name]]
    if old.get("vectors") != new.get("vectors"):
        changes.append("the teacher's vectors are others")
    for name in sorted({*old["sources"], *new["sources"]}):
        before, after = old["sources"].get(name), new["sources"].get(name)
        if before is None or after is None:
            changes.append(f"source {name} was {'added' if before is None else 'removed'}")
            continue
        if before["shards"] != after["shards"]:
            changes.append(f"source {name}: its shards are others")
        changes += [
            f"source {name}: {key} {before[key]} -> {after[key]}"
            for key in ("samples", "share")
            if before[key] != after[key]
        ]
    return changes
