"""What kind of input a path is, recognised from what is there; and its items."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from agff.errors import ConfigError, DataError
from agff.files import sha256_of
from data_pipeline.corpora.corpus import Corpus
from data_pipeline.corpora.images import find_images
from data_pipeline.corpora.pairs import SIDES, pair_items
from data_pipeline.corpora.shard_items import shard_items
from data_pipeline.corpora.tables import open_json_items, open_parquet_items
from data_pipeline.layouts.columns import column_names
from data_pipeline.layouts.mmeb_train import pairs_of_tables, rows_of_table
from data_pipeline.manifest import MANIFEST_FILE, Manifest, read_manifest
from data_pipeline.remote import CacheConfig, open_folder

Kind = Literal["shards", "images", "json", "parquet", "pairs"]
NAMES: dict[Kind, str] = {
    "shards": "folder of shards",
    "images": "folder of images",
    "json": "JSON rows",
    "parquet": "parquet rows",
    "pairs": "MMEB-train's parquet",
}
OPTIONS: dict[Kind, tuple[str, ...]] = {
    "shards": ("all_vectors", "sources", "sides", "dtype"),
    "images": ("dtype",),
    "json": ("images", "dtype"),
    "parquet": ("images", "dtype"),
    "pairs": ("images", "sides", "dtype"),
}
"""Options that an input of the kind takes beside those of all."""
_IN_TABLES = (".parquet", ".jsonl", ".json", ".csv", ".tar")
_PAIR_COLUMNS = {"qry", "pos_text"}


def kind_of(location: str) -> Kind:
    """Raises ConfigError, with what is there, for what is none or may be two of them."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location):
        return "shards"
    path = Path(location)
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.suffix in (".jsonl", ".json"):
        return "json"
    if path.suffix != ".parquet":
        raise ConfigError(
            f"{path}: a file must be rows as .jsonl, .json or .parquet; or name a folder of images or shards"
        )
    names = set(column_names(path))
    is_pairs, is_rows = names >= _PAIR_COLUMNS, bool(names & {"text", "image"})
    if is_pairs and is_rows:
        raise ConfigError(
            f"{path}: has columns of MMEB-train (qry, pos_text) and of items (text, image); which are meant "
            "cannot be known: leave one of both out of the table"
        )
    return "pairs" if is_pairs else "parquet"


def _kind_of_folder(folder: Path) -> Kind:
    if (folder / MANIFEST_FILE).exists():
        return "shards"
    tables = sorted(path.name for path in folder.iterdir() if path.suffix in _IN_TABLES)
    if tables:
        raise ConfigError(
            f"{folder}: holds {tables[0]}{f' and {len(tables) - 1} more tables' if tables[1:] else ''}; name "
            f"the table itself, or a folder of images alone, or of shards (with {MANIFEST_FILE})"
        )
    if found := next(
        (path for end in ("parquet", "tar") for path in sorted(folder.glob(f"*/*.{end}"))), None
    ):
        raise ConfigError(
            f"{folder}: holds {found.relative_to(folder)}; name a table itself; of shards, {MANIFEST_FILE} "
            "is missing: give the command of launcher/prepare.py again to complete them"
        )
    return "images"


def open_corpus(
    location: str,
    *,
    images: Path | None = None,
    sides: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
) -> Corpus:
    """The items of an input. images: folder of the images of a table (default: that of the table; of
    MMEB-train's the folder above). sides: of SIDES (default: all). Raises ConfigError or DataError."""
    kind, path = kind_of(location), Path(location)
    wanted = tuple(side for side in SIDES if sides is None or side in sides)
    if kind == "shards":
        manifest = read_manifest(open_folder(location, CacheConfig()))
        return shard_items(location, manifest, sources=chosen_sources(sources, manifest), sides=wanted)
    if kind == "images":
        return find_images(path)
    root = images or (path.absolute().parent.parent if kind == "pairs" else path.parent)
    if not root.is_dir():
        raise ConfigError(f"--images {root}: no such folder")
    if kind == "json":
        return open_json_items(path, root, sha256=sha256_of(path))
    if kind == "parquet":
        return open_parquet_items(path, root, sha256=sha256_of(path))
    if not (num_rows := rows_of_table(path)):
        raise DataError(f"{path}: no rows")
    return pair_items(
        path.parent.name,
        pairs_of_tables(root, [path], start=0, stop=num_rows),
        sides=wanted,
        folder=path.parent,
        images=root,
        tables=[sha256_of(path)],
    )


def chosen_sources(wanted: Sequence[str] | None, manifest: Manifest) -> list[str]:
    """Sources of shards by their names, all where None are named. Raises ConfigError for an unknown one."""
    if wanted is None:
        return sorted(manifest.sources)
    if unknown := sorted(set(wanted) - manifest.sources.keys()):
        raise ConfigError(
            f"--sources {' '.join(unknown)}: the shards have no such source; they have "
            f"{', '.join(sorted(manifest.sources))}"
        )
    return sorted(set(wanted))
