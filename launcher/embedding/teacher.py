"""Who may be a teacher: a release or run of ours, or a sentence-transformers folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from agff.batch import IMAGE_PLACEHOLDER, Item
from agff.contract import CONTRACT_FILE
from agff.embedder import Embedder
from agff.errors import ConfigError, DataError
from agff.processor import ItemProcessor
from launcher.embedding.sentence_model import MODULES_FILE, SentenceModel
from launcher.encoding.vector_cache import model_key
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

    def num_cut(self, items: Sequence[Item]) -> int:
        """How many of the items have a text whose end is beyond what it reads."""


class OurModel:
    """A release or run: its global vectors."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.identity = f"{embedder.processor.family.name}, model sha256 {model_key(embedder)}"
        self.dim = embedder.encode("a").shape[-1]
        self.seen_pixels: int | None = embedder.processor.max_image_pixels

    def encode(self, items: Sequence[Item], *, batch_size: int) -> NDArray[np.float32]:
        """See Teacher."""
        return self._embedder.encode(list(items), batch_size=batch_size)[:, 0].numpy()

    def num_cut(self, items: Sequence[Item]) -> int:
        """See Teacher."""
        return num_cut(self._embedder, items)


def num_cut(embedder: Embedder, items: Iterable[Item]) -> int:
    """How many of the items have a text whose end the model does not see. Those that it refuses do not
    count."""
    count = 0
    for item in items:
        with contextlib.suppress(DataError):
            count += _is_cut(embedder.processor, item)
    return count


def _is_cut(processor: ItemProcessor, item: Item) -> bool:
    most = processor.limits.max_tokens
    if processor.num_tokens(item) < most:
        return False
    texts = [item.text] if item.image is None else item.text.split(IMAGE_PLACEHOLDER)
    without_text = replace(item, text="" if item.image is None else IMAGE_PLACEHOLDER)
    of_texts = sum(len(processor.tokenize(text)) for text in texts)
    return of_texts + processor.num_tokens(without_text) > most


def open_teacher(folder: Path, device: torch.device) -> Teacher:
    """The model of the folder, on this device. Raises ConfigError or CheckpointError."""
    if not _is_ours(folder) and (folder / MODULES_FILE).exists():
        return SentenceModel(folder, device)
    if not _is_ours(folder):
        reason = "no teacher here" if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"{folder}: {reason}; name a release ({CONTRACT_FILE}), a run ({CONFIG_FILE}), or a "
            f"sentence-transformers folder ({MODULES_FILE})"
        )
    return OurModel(open_embedder(folder, device))


def open_embedder(folder: Path, device: torch.device) -> Embedder:
    """The release or run of ours in the folder, on this device. Raises ConfigError or CheckpointError."""
    if not _is_ours(folder):
        reason = "no release or run of ours" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {reason}; name a release ({CONTRACT_FILE}) or a run ({CONFIG_FILE})")
    embedder = load_model(folder)
    embedder.model.to(device)
    return embedder


def _is_ours(folder: Path) -> bool:
    return (folder / CONTRACT_FILE).exists() or (folder / CONFIG_FILE).exists()
