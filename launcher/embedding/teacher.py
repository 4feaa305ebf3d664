"""Who may be a teacher: a release or run of ours, or a sentence-transformers folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from agff.batch import Item
from agff.contract import CONTRACT_FILE
from agff.embedder import Embedder
from agff.errors import ConfigError
from launcher.embedding.sentence_model import MODULES_FILE, SentenceModel
from launcher.run.config_file import CONFIG_FILE
from launcher.run.trained_model import load_model


class Teacher(Protocol):
    """Items -> vectors."""

    identity: str
    """Another text for other weights."""
    dim: int
    """E."""
    seen_pixels: int | None
    """Of one image at most; None: it takes texts alone."""

    def encode(self, items: Sequence[Item], *, batch_size: int) -> NDArray[np.float32]:
        """(N, E) vectors. Raises DataError for an item that it cannot represent."""


class OurModel:
    """A release or run: its global vectors."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.identity = f"{embedder.processor.family.name}, weights sha256 {embedder.weights_sha256}"
        self.dim = embedder.encode("a").shape[-1]
        self.seen_pixels: int | None = embedder.processor.max_image_pixels

    def encode(self, items: Sequence[Item], *, batch_size: int) -> NDArray[np.float32]:
        """See Teacher."""
        return self._embedder.encode(list(items), batch_size=batch_size)[:, 0].numpy()


def open_teacher(folder: Path, device: torch.device) -> Teacher:
    """The model of the folder, on this device. Raises ConfigError or CheckpointError."""
    if (folder / CONTRACT_FILE).exists() or (folder / CONFIG_FILE).exists():
        embedder = load_model(folder)
        embedder.model.to(device)
        return OurModel(embedder)
    if (folder / MODULES_FILE).exists():
        return SentenceModel(folder, device)
    reason = "no teacher here" if folder.is_dir() else "no such folder"
    raise ConfigError(
        f"{folder}: {reason}; name a release ({CONTRACT_FILE}), a run ({CONFIG_FILE}), or a "
        f"sentence-transformers folder ({MODULES_FILE})"
    )
