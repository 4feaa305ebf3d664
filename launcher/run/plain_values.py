"""Text -> plain values, with nothing guessed: YAML and JSON in which a key is given once and a number looks
like one.

YAML 1.1 reads 0644 as 420, 1:30 as 90, `yes` and `off` as true and false, 1_000 as 1000 and 2026-01-01 as a
date. Here they are text, so that the check of types (launcher/run/typed_values.py) names them where a number
is wanted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agff.errors import ConfigError, listed

_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)",
}
"""What is no text when it is not quoted: YAML 1.2's core schema without its octal and hexadecimal numbers."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, the parent's type


class _Dumper(yaml.SafeDumper):
    """Quotes text that either set of rules would take for something else."""


for _name, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$"), None)


@dataclass(frozen=True, kw_only=True)
class Document:
    """The mapping that a file holds."""

    values: dict[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)
    """Line of each dotted key; empty for JSON."""


def parse_yaml(text: str, name: str) -> Document:
    """A YAML mapping, empty when the text is. name: what messages begin with.

    Raises ConfigError: no YAML, another kind of value, a tag such as `!!python`, or keys given twice, at any
    depth; all of them are listed.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    if node is None:
        return Document(values={})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{name}: expected settings, `key: value` on each line, found {describe(_plain(node))}"
        )
    reader = _NodeReader(name)
    values = reader.read(node, "")
    fail_with_all(reader.problems)
    return Document(values=values, lines=reader.lines)


def parse_yaml_value(text: str) -> Any:
    """What a single value of a recipe is; text that is no YAML is text. Raises ConfigError for a key given
    twice."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    return None if node is None else _plain(node)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml`, and readers of YAML 1.1 and 1.2, read back equal."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text. Raises ConfigError: no JSON, keys given twice, NaN or Infinity."""
    problems: list[str] = []

    def pairs(found: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in found]
        repeated = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        problems.extend(
            f'{name}: the key "{key}" is given {keys.count(key)} times; keep one' for key in repeated
        )
        return dict(found)

    def constant(word: str) -> None:
        problems.append(f"{name}: {word} is no number of JSON; write a finite one")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not JSON: {error}") from None
    fail_with_all(problems)
    return value


def read_text(path: Path, what: str) -> str:
    """A text file. Raises ConfigError that says what it should have been; FileNotFoundError goes through."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read {what}: {error}") from None


def fail_with_all(problems: Sequence[str]) -> None:
    """Raises one ConfigError that lists every problem, a line each; nothing when there is none."""
    if problems:
        raise ConfigError(listed(f"{len(problems)} problems", problems))


def describe(value: Any) -> str:
    """A plain value as messages name it: `the text '8'`, `the number 8.0`, `null`, `a mapping`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value!r}"
        case int() | float():
            return f"the number {value}"
        case Mapping():
            return "a mapping"
        case list():
            return "a list"
    return f"a {type(value).__name__}"


def _plain(node: yaml.Node) -> Any:
    reader = _NodeReader("")
    value = reader.read(node, "")
    fail_with_all([problem.partition(": ")[2] for problem in reader.problems])
    return value


class _NodeReader:
    """Turns YAML's nodes into plain values; collects problems and the line of each dotted key."""

    def __init__(self, name: str) -> None:
        self.problems: list[str] = []
        self.lines: dict[str, int] = {}
        self._name = name
        self._open: list[yaml.Node] = []

    def read(self, node: yaml.Node, key: str) -> Any:
        """The value of a node; `key` is its dotted name."""
        if node in self._open:
            return self._problem(node, f"{key}: an alias of what it is part of")
        self._open.append(node)
        try:
            match node:
                case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                    return self._mapping(node, key)
                case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                    return [self.read(child, f"{key}.{index}") for index, child in enumerate(node.value)]
                case yaml.ScalarNode():
                    return self._scalar(node, key)
            return self._problem(node, f"{key}: the tag {node.tag} is not read; plain values only")
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, child in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self._problem(name_node, f"{key or 'key'}: expected text as key, found a list or mapping")
                continue
            name = f"{key}.{name_node.value}" if key else name_node.value
            if name_node.value in values:
                first = self.lines[name]
                self._problem(name_node, f"{name} is given twice, first on line {first}; keep one of them")
            self.lines[name] = _line(name_node)
            values[name_node.value] = self.read(child, name)
        return values

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        if kind == "str":
            return text
        if kind not in _SCALARS or not re.fullmatch(_SCALARS[kind], text):
            return self._problem(
                node, f"{key}: {text!r} with the tag {node.tag} is not read; plain values only"
            )
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text)
        return float(text.replace(".", "") if text[-1].isalpha() else text)  # .Inf, -.inf, .NaN

    def _problem(self, node: yaml.Node, text: str) -> None:
        self.problems.append(f"{self._name}:{_line(node)}: {text}")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
