"""Hand-made subsets in MMEB-train's layout, and what a conversion left in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def row(**values: str) -> dict[str, str]:
    return {"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": "", **values}


def write_subset(root: Path, rows: list[dict[str, Any]], name: str = "Sub") -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / name / "original-00000-of-00001.parquet")


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
