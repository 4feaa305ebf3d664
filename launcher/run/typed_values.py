"""Plain values -> frozen dataclasses by their type hints. A value is checked for its type, never converted.

An int is accepted as a float (1 is 1.0), and so is text in exponent notation, which is what YAML 1.1 makes of
5e-5. "8", 8.0 and true are no int, 1 and "true" no bool, 123 no text, null only where the hint has
None, and NaN and infinity nowhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from agff.errors import ConfigError
from launcher.run.plain_values import describe

Problem = Callable[[str, str], None]
"""Takes a dotted name and what is wrong with its value."""

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TypeCheck:
    """Collects what is wrong with plain values.

    fields_of: name -> hint of the keys of a hint that is a mapping with known keys; None for other hints.
    is_json: 5e8 is accepted as an int, as DeepSpeed's documentation writes it; text never as a float.
    all_names: dotted names of all settings, to find the right section of one in the wrong section.
    """

    problem: Problem
    fields_of: Callable[[Any], Mapping[str, Any] | None]
    is_json: bool = False
    all_names: Sequence[str] = ()

    def value(self, value: Any, hint: Any, name: str) -> Any:
        """The value, or None and a problem."""
        if typing.get_origin(hint) in (Union, types.UnionType):
            return self._union(value, typing.get_args(hint), name)
        if self.fields_of(hint) is not None:
            return self.keys(value, hint, name)
        if (typing.get_origin(hint) or hint) in (dict, list):
            return self._container(value, hint, name)
        if not _is_of_type(value, hint, is_json=self.is_json):
            self.problem(
                name, f"expected {expected(hint)}, found {describe(value)}{_other_reading(value, hint)}"
            )
            return None
        return float(value) if hint is float else value

    def keys(self, values: Any, hint: Any, name: str) -> dict[str, Any] | None:
        """The values of a mapping with known keys, checked; those of unknown ones are left out."""
        hints = self.fields_of(hint)
        assert hints is not None
        if not isinstance(values, Mapping):
            self.problem(name, f"expected a mapping of {', '.join(hints)}, found {describe(values)}")
            return None
        prefix = f"{name}." if name else ""
        for key in values:
            if key not in hints:
                near = [f"{prefix}{match}" for match in difflib.get_close_matches(key, hints, n=2)]
                near += [other for other in self.all_names if other.split(".")[-1] == key]
                known = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(hints)}"
                self.problem(f"{prefix}{key}", f"unknown; {known}")
        return {key: self.value(values[key], hints[key], f"{prefix}{key}") for key in hints if key in values}

    def _union(self, value: Any, members: tuple[Any, ...], name: str) -> Any:
        if value is None and type(None) in members:
            return None
        if isinstance(value, Mapping):
            for member in members:
                if self.fields_of(member) is not None or typing.get_origin(member) is dict:
                    return self.value(value, member, name)
        for member in members:
            if _is_of_type(value, member, is_json=self.is_json):
                return self.value(value, member, name)
        wanted = " or ".join(expected(member) for member in members if member is not type(None))
        wanted += " or null" if type(None) in members else ""
        self.problem(name, f"expected {wanted}, found {describe(value)}{_other_reading(value, *members)}")
        return None

    def _container(self, value: Any, hint: Any, name: str) -> Any:
        if not isinstance(value, typing.get_origin(hint) or hint):
            self.problem(name, f"expected {expected(hint)}, found {describe(value)}")
            return None
        of = (typing.get_args(hint) or (Any,))[-1]
        if isinstance(value, dict):
            return {key: self.value(item, of, f"{name}.{key}") for key, item in value.items()}
        return [self.value(item, of, f"{name}.{index}") for index, item in enumerate(value)]


def build(cls: Any, values: Mapping[str, Any], problem: Problem, name: str = "") -> Any:
    """The dataclass of plain values; None after a problem. What `__post_init__` refuses is a problem too."""
    found: list[str] = []

    def note(key: str, text: str) -> None:
        found.append(key)
        problem(key, text)

    check = TypeCheck(problem=note, fields_of=dataclass_hints, all_names=setting_names(cls))
    checked = check.keys(values, cls, name)
    return None if checked is None else _built(cls, checked, note, found, name)


def _built(cls: Any, checked: dict[str, Any], note: Problem, found: list[str], name: str) -> Any:
    hints = dataclass_hints(cls)
    assert hints is not None
    arguments = {}
    for field in dataclasses.fields(cls):
        key = f"{name}.{field.name}" if name else field.name
        if field.name in checked:
            value, inner = checked[field.name], dataclass_in(hints[field.name])
            arguments[field.name] = (
                _built(inner, value, note, found, key) if inner and value is not None else value
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            note(key, "missing; it has no default")
    if any(key == name or not name or key.startswith(f"{name}.") for key in found):
        return None
    try:
        return cls(**arguments)
    except ConfigError as error:
        note("", str(error))
        return None


def dataclass_hints(hint: Any) -> Mapping[str, Any] | None:
    """Name -> type hint of a dataclass's fields; None for any other hint."""
    if not dataclasses.is_dataclass(hint):
        return None
    hints = typing.get_type_hints(hint)
    return {field.name: hints[field.name] for field in dataclasses.fields(hint)}


def dataclass_in(hint: Any) -> Any:
    """The dataclass of a hint, also of one that may be None; else None."""
    return next(
        (member for member in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(member)), None
    )


def is_optional(hint: Any) -> bool:
    """Whether a value may be null."""
    return type(None) in typing.get_args(hint)


def setting_names(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a dataclass, those of inner ones included."""
    names = []
    for name, hint in (dataclass_hints(cls) or {}).items():
        inner = dataclass_in(hint)
        names.append(f"{prefix}{name}")
        names += setting_names(inner, f"{prefix}{name}.") if inner else []
    return names


def _is_of_type(value: Any, hint: Any, *, is_json: bool = False) -> bool:
    """Whether a plain value that is no mapping or list has the type of a hint."""
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return any(type(value) is type(choice.value) and value == choice.value for choice in hint)
    if hint is Any:
        return True
    if hint is Path:
        return isinstance(value, str)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        if isinstance(value, str):
            return not is_json and bool(_EXPONENT.fullmatch(value)) and math.isfinite(float(value))
        return isinstance(value, int | float) and math.isfinite(value)
    if hint is int and is_json and isinstance(value, float):
        return value.is_integer()
    return hint in _NAMES and isinstance(value, hint)


def expected(hint: Any) -> str:
    """A type hint in words."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(str(choice.value) for choice in hint)}"
    if typing.get_origin(hint) is dict:
        return f"a mapping of names to {expected(typing.get_args(hint)[1])}".replace("to a ", "to ") + "s"
    if typing.get_origin(hint) is list or hint is list:
        return "a list"
    return _NAMES.get(hint, "a mapping")


def _other_reading(value: Any, *hints: Any) -> str:
    """A remedy where text and numbers are easily taken for each other."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return "; it must be finite"
        return f"; write it in quotes: '{value}'" if str in hints else ""
    if not isinstance(value, str):
        return ""
    try:
        other = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return ""
    if isinstance(other, bool):
        return "; write true or false" if bool in hints else ""
    if isinstance(other, int | float) and {int, float} & set(hints):
        return f"; other readers of YAML take it for {other}: write the number plainly, without quotes"
    return ""
