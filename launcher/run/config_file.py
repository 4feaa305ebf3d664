"""The files of a configuration: a recipe, and what a run folder stores. One reader for both, without a
command line."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agff.contract import CONTRACT_FILE
from agff.errors import CheckpointError, ConfigError
from agff.files import write_text
from agff.objectives import OBJECTIVES
from launcher.run.config import ResolvedRun, RunConfig, as_dict, run_config_of
from launcher.run.plain_values import (
    Document,
    describe,
    dump_yaml,
    fail_with_all,
    parse_json,
    parse_yaml,
    parse_yaml_value,
    read_text,
)
from launcher.run.typed_values import build, dataclass_hints, dataclass_in, setting_names

CONFIG_FILE = "config.yaml"
DEEPSPEED_FILE = "deepspeed.json"

MOVED = {"loss.beta": "fusion.beta"}
"""Settings of before and what they are called now."""
PATHS = (
    "backbone.path",
    "prompts.start_from",
    "data.shards",
    "data.vectors",
    "validation.mmeb_eval",
    "validation.mmeb_images",
    "validation.mmvp",
    "validation.captions",
    "validation.caption_images",
    "validation.shards",
    "validation.vectors",
)
"""Settings that name a folder of the machine (or, shards, a URL); a run folder stores them absolute."""


def read_recipe(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """A recipe with `(dotted name, text)` overrides, which win.

    Raises one ConfigError that lists everything that is wrong: keys given twice, unknown keys, missing ones,
    values of another type, values out of range; each with file and line, or with its `--name`.
    """
    try:
        document = parse_yaml(read_text(path, "the recipe"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe") from None
    values, problems = copy.deepcopy(document.values), list[str]()
    address = _address(document, str(path), {name for name, _ in overrides})
    cls = _config_class({**values, **dict(overrides)}, address)
    for name, text in overrides:
        try:
            _override(values, name, text, cls)
        except ConfigError as error:
            problems.append(f"--{name}: {error}")
    config = build(cls, values, lambda name, text: problems.append(address(name, text)))
    fail_with_all(problems)
    return config


def read_run_config(folder: Path) -> RunConfig:
    """The configuration that a run was started with. Raises CheckpointError when the folder is no run, and
    ConfigError when its configuration is not one of this version."""
    document, problems = _stored(folder), list[str]()
    address = _address(document, str(folder / CONFIG_FILE), frozenset())
    cls = _config_class(document.values, address)
    config = build(cls, document.values, lambda name, text: problems.append(address(name, text)))
    fail_with_all(problems)
    return config


def stored_values(folder: Path) -> dict[str, Any]:
    """The settings of a run folder as they were written. Raises CheckpointError or ConfigError."""
    document, path = _stored(folder), folder / CONFIG_FILE
    fail_with_all(
        [
            _address(document, str(path), frozenset())(name, "")
            for name in MOVED
            if _get(document.values, name) is not None
        ]
    )
    return document.values


def stored_deepspeed(folder: Path) -> dict[str, Any]:
    """The DeepSpeed configuration of a run folder. Raises ConfigError."""
    path = folder / DEEPSPEED_FILE
    try:
        values = parse_json(read_text(path, "the DeepSpeed configuration"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; restore it from a copy, or choose another --run_dir") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {describe(values)}")
    return values


def write_run_config(run: ResolvedRun) -> None:
    """Record the final configuration. config.yaml comes last: with it the folder is a run."""
    write_text(run.run_dir / DEEPSPEED_FILE, json.dumps(run.deepspeed, indent=2) + "\n")
    write_text(run.run_dir / CONFIG_FILE, dump_yaml(with_paths(as_dict(run.config), os.path.abspath)))


def with_paths(values: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The settings with `change` applied to those that name a folder of this machine."""
    changed = copy.deepcopy(dict(values))
    for name in PATHS:
        section, key = name.split(".")
        path = _get(changed, name)
        if isinstance(path, str) and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path):  # a URL stays
            changed[section][key] = change(path)
    return changed


def hint_of(name: str, cls: type[RunConfig]) -> Any:
    """The type hint of a setting, also of one name in a mapping such as data.weights; None for an unknown
    one. cls: of the run's objective (`run_config_of`)."""
    hint: Any = cls
    for part in name.split("."):
        inner = dataclass_in(hint)
        if inner is not None:
            hint = (dataclass_hints(inner) or {}).get(part)
        else:
            mappings = [h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is dict]
            hint = typing.get_args(mappings[0])[1] if mappings else None
        if hint is None:
            return None
    return hint


def _config_class(values: Mapping[str, Any], address: Callable[[str, str], str]) -> type[RunConfig]:
    """RunConfig with the settings of the objective that is named."""
    objective = values.get("objective", "contrastive")
    try:
        return run_config_of(objective if isinstance(objective, str) else describe(objective))
    except ConfigError as error:
        raise ConfigError(address("objective", str(error))) from None


def _override(values: dict[str, Any], name: str, text: str, cls: type[RunConfig]) -> None:
    """Put one override of the command line into the settings. Raises ConfigError."""
    hint = hint_of(name, cls)
    if hint is None and name not in MOVED:
        raise ConfigError(_unknown(name, cls))
    value = parse_yaml_value(text)
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = typing.get_args(hint) if is_union else (hint,)
    if not (value is None and type(None) in choices) and (
        str in choices or typing.get_origin(hint) is typing.Literal
    ):
        value = text  # on the command line nobody quotes
    _put(values, name, name.split("."), value, cls)


def _unknown(name: str, cls: type[RunConfig]) -> str:
    if others := _objectives_with(name):
        return f"unknown to this objective; it is a setting of {others}"
    known = setting_names(cls)
    near = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    near = near or difflib.get_close_matches(name, known, n=2)
    return f"unknown; did you mean --{' or --'.join(near)}?" if near else "unknown; --help lists all settings"


def _objectives_with(name: str) -> str:
    """Objectives that have this setting of the section `loss`."""
    owners = [key for key, cls in OBJECTIVES.items() if name in setting_names(cls, "loss.")]
    return " and ".join(f"objective {key}" for key in owners)


def _put(values: dict[str, Any], name: str, parts: Sequence[str], value: Any, cls: type[RunConfig]) -> None:
    first, *rest = parts
    if (
        not rest
        and isinstance(value, dict)
        and isinstance(values.get(first), dict)
        and dataclass_in(hint_of(name, cls))
    ):
        for key, item in value.items():  # a section: what it does not name stays
            _put(values[first], f"{name}.{key}", [key], item, cls)
    elif not rest:
        values[first] = value
    else:
        if values.get(first) is None:
            values[first] = {}
        if not isinstance(values[first], dict):
            raise ConfigError(
                f"{first} is {describe(values[first])} and has no {rest[0]}; give {first} whole"
            )
        _put(values[first], name, rest, value, cls)


def _address(
    document: Document, file: str, overrides: frozenset[str] | set[str]
) -> Callable[[str, str], str]:
    """(dotted name, what is wrong) -> a message that begins with file and line, or with `--name`."""

    def message(name: str, text: str) -> str:
        if name in MOVED:
            text = f"is called {MOVED[name]} now; rename it"
        elif text.startswith("unknown; ") and (owners := _objectives_with(name)):
            text = f"unknown to this objective; it is a setting of {owners}"
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        if any(prefix in overrides for prefix in prefixes):
            return f"--{name}: {text}"
        line = next((f":{document.lines[prefix]}" for prefix in prefixes if prefix in document.lines), "")
        return f"{file}{line}: {name}: {text}" if name else text

    return message


def _stored(folder: Path) -> Document:
    path = folder / CONFIG_FILE
    try:
        return parse_yaml(read_text(path, "the configuration of a run"), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {_no_run(folder)}") from None


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder; name a run"
    if (folder / CONTRACT_FILE).exists():
        return f"a release, not a run ({CONFIG_FILE} is missing); name the run that it was made of"
    return f"neither a run ({CONFIG_FILE} is missing) nor a release ({CONTRACT_FILE} is missing)"


def _get(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
