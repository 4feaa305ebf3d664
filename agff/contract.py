"""The contract of a release, `agff_config.json`: what must be known to use its files as in training, and what
these files are."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from agff.backbone_folder import HEAD_FILE
from agff.batch import TextRule
from agff.errors import CheckpointError, ConfigError
from agff.files import changed_files, file_fingerprint
from agff.nested import Truncations
from agff.objectives import OBJECTIVES
from agff.objectives.objective import Objective
from agff.processor import ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig

CONTRACT_FILE = "agff_config.json"
CARD_FILE = "README.md"
FORMAT = 7
"""Counts up when a field of Contract, of the settings in it, or the golden items change."""
MAX_HASHED_BYTES = 64 * 2**20
"""Loading compares larger files, the weights, by size: it does not read 15 GB twice, and the golden vectors
are a test of them. Not of a head that also generates, so that file is always compared whole: 1 s for 1 GB."""
CONVERT_AGAIN = (
    "copy the release again, or convert the checkpoint again (launcher/convert_checkpoint.py RUN OUT)"
)


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Everything but weights. Its fields are the keys of the JSON file."""

    prompts: PromptConfig
    processor: ProcessorConfig
    fusion: FusionConfig
    nested: Truncations
    texts: TextRule
    objective: str | None
    """Of a head that is part of the model, the name in agff.objectives.OBJECTIVES; null: there is none."""
    objective_settings: dict[str, Any]
    """Of that objective."""
    pooling: str
    dtype: Literal["float32", "bfloat16"]
    """Number format of the weights."""
    weights: Literal["whole", "adapter", "both"]
    """A whole backbone, an adapter alone, or both, which are then the same model."""
    base_model: str | None
    """Of an adapter, the name on the hub of the backbone that it is of; null: there is no adapter, or the
    name is not known."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    origin: dict[str, Any]
    """Where the weights come from."""
    files: dict[str, str]
    """Size and SHA-256 of each file that loading reads, by its name."""


def released_objective(contract: Contract) -> Objective | None:
    """The objective whose head is part of the model. Raises ConfigError for one that this version does not
    have."""
    if contract.objective is None:
        return None
    if contract.objective not in OBJECTIVES:
        raise ConfigError(f"objective={contract.objective} is not one of {', '.join(OBJECTIVES)}")
    return _from_json(OBJECTIVES[contract.objective], contract.objective_settings, "objective_settings")


def write_contract(folder: Path, contract: Contract) -> None:
    """Write it as the last file of a release: what has it is complete."""
    values = {"format": FORMAT, **dataclasses.asdict(contract)}
    (folder / CONTRACT_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_contract(folder: Path) -> Contract:
    """The contract of a release folder, each value checked for its type. Raises CheckpointError."""
    path = folder / CONTRACT_FILE
    if not path.is_file():
        reason = f"no release here ({CONTRACT_FILE} is missing)" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {reason}; make one with launcher/convert_checkpoint.py RUN OUT")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; {CONVERT_AGAIN}") from None
    found: Any = values.pop("format", None) if isinstance(values, dict) else None
    if type(found) is int and found != FORMAT:
        age, remedy = "newer", "update agff-embed"
        if found < FORMAT:
            age, remedy = "older", "convert the checkpoint again (launcher/convert_checkpoint.py RUN OUT)"
        raise CheckpointError(
            f"{path}: format {found} is {age} than {FORMAT}, which this version reads; {remedy}, or use the "
            "version that wrote it"
        )
    if type(found) is not int:
        raise CheckpointError(f"{path}: `format` must be the number {FORMAT}; {CONVERT_AGAIN}")
    try:
        return _from_json(Contract, values, "")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; {CONVERT_AGAIN}") from None


def fingerprints(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Size and SHA-256 of every file there but the card, which no program reads. known: those that need not
    be read again."""
    known = known or {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: known.get(name) or file_fingerprint(folder / name) for name in names if name != CARD_FILE}


def check_files(folder: Path, contract: Contract) -> None:
    """Raise CheckpointError, with a line for each, when files are not those that were released."""
    by_size = {name: written for name, written in contract.files.items() if name != HEAD_FILE}
    whole = {name: written for name, written in contract.files.items() if name == HEAD_FILE}
    problems = changed_files(folder, by_size, max_hashed_bytes=MAX_HASHED_BYTES)
    if problems := problems + changed_files(folder, whole):
        raise CheckpointError(
            "\n".join(problems)
            + f"\n{folder}: not as it was released; {CONVERT_AGAIN}. To look at it all the "
            "same, pass check=False"
        )


def _from_json(kind: Any, values: Any, where: str) -> Any:
    """The dataclass whose fields the JSON object has, all of them and no other; nothing is converted."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the file'} must be a JSON object, found {_shown(values)}")
    all_hints, prefix = get_type_hints(kind), f"{where}." if where else ""
    hints = {field.name: all_hints[field.name] for field in dataclasses.fields(kind)}
    if missing := sorted(hints.keys() - values.keys()):
        raise ConfigError(f"{', '.join(prefix + name for name in missing)} missing")
    if unknown := sorted(values.keys() - hints.keys()):
        raise ConfigError(f"{', '.join(prefix + name for name in unknown)} unknown to this version")
    arguments = {}
    for name, hint in hints.items():
        value = values[name]
        if dataclasses.is_dataclass(hint):
            value = _from_json(hint, value, prefix + name)
        elif not _fits(value, hint):
            raise ConfigError(f"{prefix}{name}={_shown(value)} must be {_name_of(hint)}")
        arguments[name] = value
    return kind(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type. True, false, NaN and Infinity are no numbers."""
    if hint is Any:
        return True
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(part, get_args(hint)[1]) for part in value.values())
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(part, get_args(hint)[0]) for part in value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _name_of(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
