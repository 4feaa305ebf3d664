"""The 36 sets of MMEB, and `sets.json`, which may describe others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agff.errors import DataError
from data_pipeline.layouts.json_rows import read_json

# meta-task -> (sets whose training part is in MMEB-train, sets never trained on)
_MMEB_SETS = {
    "classification": (
        ("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
        ("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    ),
    "vqa": (
        ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"),
        ("ScienceQA", "VizWiz", "GQA", "TextVQA"),
    ),
    "retrieval": (
        (
            "VisDial",
            "CIRR",
            "VisualNews_t2i",
            "VisualNews_i2t",
            "MSCOCO_t2i",
            "MSCOCO_i2t",
            "NIGHTS",
            "WebQA",
        ),
        ("FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    ),
    "grounding": (("MSCOCO",), ("RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")),
}


_KEYS = ("meta_task", "in_distribution", "note", "about")
"""Of a set in sets.json; "about" is for people."""


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """Where a set's score belongs in the report."""

    meta_task: str
    in_distribution: bool
    note: str | None = None
    """A sentence that must appear wherever the score is printed."""


MMEB_SETS: Mapping[str, SetInfo] = {
    name: SetInfo(meta_task=meta_task, in_distribution=names is in_distribution)
    for meta_task, (in_distribution, out_of_distribution) in _MMEB_SETS.items()
    for names in (in_distribution, out_of_distribution)
    for name in names
}
"""The 36 sets of MMEB."""


def find_eval_sets(root: Path) -> dict[str, SetInfo]:
    """Sets under `root` in the order of sets.json, then by name.

    Raises DataError when there is none, one is unknown, or the folder of a known one holds no table.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; name the folder that holds one folder per set (--mmeb_eval)"
        )
    listed = _read_sets_json(root)
    known = {**MMEB_SETS, **listed}
    folders = sorted({table.parent.name for table in root.glob("*/*.parquet")})
    findings = [
        f"{root}: sets.json lists {name}, but there is no {name}/*.parquet"
        for name in listed
        if name not in folders
    ]
    findings += [
        f"{root / name}: holds no *.parquet of its own; finish the download or remove the folder"
        for name in sorted(known.keys() - listed.keys() - set(folders))
        if (root / name).is_dir() and _is_without_table(root / name)
    ]
    findings += [
        f"{root / name}: not one of MMEB's 36 sets; describe it in {root}/sets.json, "
        f'{{"{name}": {{"meta_task": "retrieval", "in_distribution": false}}}}'
        for name in folders
        if name not in known
    ]
    if findings:
        raise DataError("\n  ".join(findings))
    names = [*listed, *(name for name in folders if name not in listed)]
    if not names:
        raise DataError(f"{root}: found no <SET>/*.parquet")
    return {name: known[name] for name in names}


def _read_sets_json(root: Path) -> dict[str, SetInfo]:
    """The sets that `<root>/sets.json` describes; empty when there is no such file. Raises DataError."""
    path = root / "sets.json"
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        common_note = _typed(content, "note", str, optional=True)
        for name, entry in content.items():
            if unknown := [key for key in entry if key not in _KEYS] if isinstance(entry, dict) else []:
                raise ValueError(f"unknown keys {unknown} of {name}; a set has {', '.join(_KEYS)}")
        return {
            name: SetInfo(
                meta_task=_typed(entry, "meta_task", str),
                in_distribution=_typed(entry, "in_distribution", bool),
                note=_typed(entry, "note", str, optional=True) or common_note,
            )
            for name, entry in content.items()
            if name != "note"
        }
    except ValueError as error:
        raise DataError(
            f'{path}: expected {{SET: {{"meta_task": TEXT, "in_distribution": true or false}}}}, '
            f"found {error}"
        ) from None


def _is_without_table(folder: Path) -> bool:
    """Nothing at all is in it, or its tables are deeper. Images alone are a set that was put aside."""
    return next(folder.iterdir(), None) is None or next(folder.rglob("*.parquet"), None) is not None


def _typed(values: Any, name: str, kind: type, *, optional: bool = False) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{values!r} where a set is described")
    if optional and values.get(name) is None:
        return None
    if name not in values:
        raise ValueError(f"a set without {name!r}")
    if not isinstance(values[name], kind):
        raise ValueError(f"{name} = {values[name]!r}")
    return values[name]
