"""Folders of vectors without a model: the writer's place is taken, the format is the real one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agff.files import file_fingerprint
from launcher.embedding.vectors_folder import Description, VectorItem, write_description
from launcher.searching.build import IndexChoice, build_index

BETA = 0.05


def random_vectors(num_items: int, num_vectors: int = 3, dim: int = 16, *, seed: int = 0) -> Tensor:
    """(N, M, D) unit vectors in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(num_items, num_vectors, dim, generator=generator), dim=-1
    )


def write_vectors(
    folder: Path,
    vectors_NMD: Tensor,
    *,
    items: Sequence[VectorItem] | None = None,
    source: Path | None = None,
    **changes: Any,
) -> Path:
    """The vectors as launcher/embed.py leaves them. changes: of the description."""
    folder.mkdir(parents=True)
    num_items, num_vectors, dim = vectors_NMD.shape
    items = items or [
        VectorItem(id=f"item {row}", text=f"text {row}", image=None) for row in range(num_items)
    ]
    np.save(folder / "vectors.npy", vectors_NMD.numpy())
    (folder / "items.jsonl").write_text("".join(json.dumps(vars(item)) + "\n" for item in items))
    (folder / "rejected.jsonl").write_text("")
    names = ("vectors.npy", "items.jsonl", "rejected.jsonl")
    values: dict[str, Any] = {
        "model": "release",
        "weights_sha256": "a" * 64,
        "settings": {},
        "fusion": {"beta": BETA},
        "input": str(source or folder),
        "input_fingerprint": "0",
        "num_items": num_items,
        "num_vectors": num_vectors,
        "dim": dim,
        "dtype": str(vectors_NMD.numpy().dtype),
        "num_rejected": 0,
        "num_cut": 0,
        "files": {name: file_fingerprint(folder / name) for name in names},
    }
    write_description(folder, Description(**{**values, **changes}))
    return folder


def built(vectors: Path, index: Path, choice: IndexChoice) -> Path:
    """The index of the vectors."""
    build_index(vectors, index, choice, progress=lambda count: None)
    return index


def slow_scores(query_MD: Tensor, corpus_NMD: Tensor) -> Tensor:
    """(N,) fused similarity, pattern by pattern in float64: the oracle."""
    query_MD, corpus_NMD = query_MD.double(), corpus_NMD.double()
    sides = (slice(0, 1), slice(1, None))
    scores = []
    for item_MD in corpus_NMD:
        pairs_MM = query_MD @ item_MD.T
        patterns = [
            BETA * (pairs_MM[own, other] / BETA).exp().mean().log() for own in sides for other in sides
        ]
        scores.append(BETA * (torch.stack(patterns) / BETA).exp().mean().log())
    return torch.stack(scores)
