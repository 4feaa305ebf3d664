"""`python -m tests.ecosystem.write_releases OUT`: a release of each family, full and with merged adapters,
and the vectors that `agff.load` makes of the items of tests/agff/family_releases.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file

from agff.release import load
from agff.release_writer import save_release
from tests.agff.family_folders import BUILDERS
from tests.agff.family_releases import items, trained_embedder


def write(family: str, folder: Path, *, lora: bool) -> None:
    save_release(
        trained_embedder(family, folder / "public", lora=lora), folder / "release", origin={"family": family}
    )
    save_file(
        {"vectors": load(folder / "release").encode(list(items().values()))}, folder / "vectors.safetensors"
    )
    values: dict[str, Any] = {}
    for index, (name, item) in enumerate(items().items()):
        if isinstance(item, Image.Image):
            item = {"image": item}
        if isinstance(item, dict):
            path = folder / f"{index}.png"
            item["image"].save(path)
            item = {**item, "image": str(path)}
        values[name] = item
    (folder / "items.json").write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    for family in BUILDERS:
        for lora in (False, True):
            write(family, Path(sys.argv[1]) / f"{family}-{'lora' if lora else 'full'}", lora=lora)
