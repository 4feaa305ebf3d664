"""What every number of ranks must agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from agff.collectives import rank
from agff.errors import CheckpointError
from data_pipeline.layouts.eval_items import EvalItem
from launcher.encoding.items import ItemVectors, encode_items
from launcher.encoding.vector_cache import VectorCache
from tests.launcher.encoding.models import IMAGE, load_tiny, tiny_items


def damaged(folder: Path) -> EvalItem:
    """Its header is whole, so that it shows only when it is decoded."""
    content = (folder / "1.png").read_bytes()
    (folder / "damaged.png").write_bytes(content[:60] + bytes(20) + content[80:])
    return EvalItem(IMAGE, folder / "damaged.png")


def cases(folder: Path) -> dict[str, Any]:
    """{case: (vectors, refused)}."""
    model, items = load_tiny(folder), tiny_items(folder)
    found: dict[str, ItemVectors] = {}
    found["all"] = encode_items(model, items, batch_size=4, title="items")
    bad = [*items[:5], damaged(folder), EvalItem(IMAGE, folder / "gone.png")]
    found["refused"] = encode_items(model, bad, batch_size=4, title="bad")
    found["few"] = encode_items(model, items[:1], batch_size=4, title="few")
    found["none"] = encode_items(model, [], batch_size=4, title="none")
    return {name: (each.vectors.numpy(), dict(each.refused)) for name, each in found.items()}


def cached_twice(folder: Path, cache_folder: Path) -> tuple[Any, Any, int]:
    """Vectors of half of the items and then of all, from a cache; how many parts it has."""
    model, items = load_tiny(folder), tiny_items(folder)
    cache = VectorCache(cache_folder, model)
    first = encode_items(model, items[::2], batch_size=4, title="half", cache=cache)
    second = encode_items(model, items, batch_size=4, title="all", cache=cache)
    return first.vectors.numpy(), second.vectors.numpy(), len(list(cache_folder.rglob("*.safetensors")))


def fails_on_rank_1(folder: Path) -> str:
    model = load_tiny(folder)
    if rank() == 1:
        with torch.no_grad():
            model.model.prompted_embedding.vectors.fill_(torch.nan)
    try:
        encode_items(model, tiny_items(folder), batch_size=4, title="Shapes")
    except CheckpointError as error:
        return str(error)
    return "no error"
