"""`NAME-00000-of-00002.parquet`: files of which each says how many belong together."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from agff.errors import DataError
from agff.files import sha256_of

_PART = re.compile(r"(?P<name>.+)-(?P<index>\d+)-of-(?P<total>\d+)", re.ASCII)


def check_parts(paths: Sequence[Path]) -> None:
    """Refuse files that are not all parts of what they are parts of, or hold a part twice.

    paths: the files of one subset, set or split. A file without `-<index>-of-<total>` in its name is a whole
    one. Raises DataError with a line for each finding.
    """
    families: dict[tuple[Path, str], list[re.Match[str]]] = defaultdict(list)
    for path in paths:
        if part := _PART.fullmatch(path.stem):
            families[path.parent, part["name"]].append(part)
    findings = [
        f"{folder / name}: {finding}"
        for (folder, name), parts in families.items()
        for finding in _gaps(parts)
    ]
    findings += [
        f"{path}: lies beside its own parts and would be read twice; remove one of both"
        for path in paths
        if (path.parent, path.stem) in families
    ]
    if findings:
        raise DataError("\n".join(findings))


def copies(paths: Iterable[Path]) -> list[str]:
    """A line for each file that has the bytes of another one. Only files of equal size are read."""
    of_size, findings = defaultdict(list), []
    for path in paths:
        of_size[path.stat().st_size].append(path)
    first_with: dict[str, Path] = {}
    for path in (path for same_size in of_size.values() if len(same_size) > 1 for path in same_size):
        if (first := first_with.setdefault(sha256_of(path), path)) != path:
            findings.append(f"{path}: has the same bytes as {first.name}; download it again, or remove it")
    return findings


def _gaps(parts: Iterable[re.Match[str]]) -> list[str]:
    """What is wrong with the parts of one name."""
    totals = sorted({int(part["total"]) for part in parts})
    if len(totals) > 1:
        counts = " and ".join(f"-of-{total:05d}" for total in totals)
        return [f"has parts {counts}, of two versions; remove the files of one of them"]
    total, count = totals[0], Counter(int(part["index"]) for part in parts)
    findings = []
    if missing := [index for index in range(total) if index not in count]:
        findings.append(
            f"{len(missing)} of {total} parts missing: {_listed(missing, total)}; finish the download"
        )
    if twice := [index for index, number in sorted(count.items()) if number > 1]:
        findings.append(f"parts there twice: {_listed(twice, total)}; remove one of each")
    if beyond := [index for index in sorted(count) if index >= total]:
        findings.append(
            f"parts beyond the last, -{total - 1:05d}-of-{total:05d}: {_listed(beyond, total)}; remove them"
        )
    return findings


def _listed(indexes: Sequence[int], total: int) -> str:
    shown = ", ".join(f"-{index:05d}-of-{total:05d}" for index in indexes[:10])
    return shown if len(indexes) <= 10 else f"{shown} and {len(indexes) - 10} more"
