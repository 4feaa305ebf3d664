"""Vectors that were encoded before, by a hash of everything that made them.

    DIR/<hash of weights, prompts, tokenizer and processor>/<hash of the items>.safetensors
        keys     (n, 32) uint8: hash of each item's text, image bytes and region
        vectors  (n, M, D) float32

A part is written once, whole, and never changed; nothing is ever read for another model. (A cache by the
name of a set would report the scores of the checkpoint before.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Container, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agff.collectives import gather_objects, rank, world_size
from agff.embedder import Embedder
from agff.errors import DataError, StorageError
from agff.files import partial_path, publish
from launcher.encoding.loading import AnyItem, digest
from launcher.run.meeting import from_first_rank, together

_NO_KEY = b""
"""Of an item that cannot be read: nothing is kept of it."""


class VectorCache:
    """The part of a cache folder that belongs to one model. Every method is collective."""

    def __init__(self, folder: Path, model: Embedder) -> None:
        self._folder = folder / model_key(model)[:32]

    def keys(self, items: Sequence[AnyItem]) -> list[bytes]:
        """Of each item, shared out over the ranks: every file is read once."""
        own = [_key(item) for item in items[rank() :: world_size()]]
        keys = [_NO_KEY] * len(items)
        for number, part in enumerate(gather_objects(own)):
            keys[number :: world_size()] = part
        return keys

    def read(self, keys: Sequence[bytes]) -> tuple[list[int], Tensor | None]:
        """(positions of the items that are in the cache; on rank 0 alone their (n, M, D) vectors, if any).
        What rank 0 finds counts for all. Raises StorageError for a damaged part."""
        places, kept = together(lambda: self._read(keys) if rank() == 0 else ([], None))
        return from_first_rank(lambda: places), kept

    def write(self, keys: Sequence[bytes], vectors_NMD: Tensor, positions: Sequence[int]) -> None:
        """Keep the vectors of these items. Raises StorageError when they cannot be written."""

        def write() -> None:
            if rank() == 0:
                self._write([place for place in positions if keys[place] != _NO_KEY], keys, vectors_NMD)

        together(write)

    def _read(self, keys: Sequence[bytes]) -> tuple[list[int], Tensor | None]:
        wanted = {key: place for place, key in enumerate(keys) if key != _NO_KEY}
        places: list[int] = []
        parts: list[Tensor] = []
        for path in sorted(self._folder.glob("*.safetensors")):
            found, vectors_NMD = _read_part(path, wanted)
            places += [wanted.pop(key) for key in found]
            if vectors_NMD is not None:
                parts.append(vectors_NMD)
        return places, torch.cat(parts) if places else None

    def _write(self, positions: Sequence[int], keys: Sequence[bytes], vectors_NMD: Tensor) -> None:
        if not positions:
            return
        name = hashlib.sha256(b"".join(keys[place] for place in positions)).hexdigest()[:32]
        path = self._folder / f"{name}.safetensors"
        partial = partial_path(path)
        content = b"".join(keys[place] for place in positions)
        keys_NB = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(len(positions), -1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"keys": keys_NB, "vectors": vectors_NMD[list(positions)].cpu()}, partial)
            publish(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise StorageError(f"{path}: vectors cannot be kept: {error.strerror or error}") from None


def model_key(model: Embedder) -> str:
    """Hash of everything that makes an item's vectors: weights and what makes their inputs."""
    return hashlib.sha256(f"{model.weights_sha256}\0{inputs_key(model)}".encode()).hexdigest()


def inputs_key(model: Embedder) -> str:
    """Hash of everything that makes a model's inputs of an item: tokenizer, image processor, limits, how many
    prompts."""
    processor = model.processor
    settings = {
        "limits": asdict(processor.limits),
        "prompts": asdict(processor.prompts),
        "images": processor.image_processor.to_dict(),
        "cells": repr(processor.cells),
        "family": processor.family.name,
    }
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    parts = (tokenizer, json.dumps(settings, sort_keys=True, default=repr))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _key(item: AnyItem) -> bytes:
    try:
        return digest(item)
    except (DataError, OSError):
        return _NO_KEY


def _read_part(path: Path, wanted: Container[bytes]) -> tuple[list[bytes], Tensor | None]:
    """(the keys that are wanted, each once; their vectors, which are not read where there are none)."""
    try:
        with safe_open(path, framework="pt") as file:
            keys_NB, vectors = file.get_tensor("keys"), file.get_slice("vectors")
            shape = vectors.get_shape()
            if keys_NB.shape != (shape[0], 32) or keys_NB.dtype != torch.uint8 or len(shape) != 3:
                raise ValueError(f"keys {list(keys_NB.shape)}, vectors {shape}")
            keys = [bytes(key) for key in keys_NB.tolist()]
            row_of = {key: row for row, key in enumerate(keys) if key in wanted}
            if not row_of:
                return [], None
            vectors_NMD = file.get_tensor("vectors")[list(row_of.values())]
        if vectors_NMD.dtype != torch.float32 or not bool(vectors_NMD.isfinite().all()):
            raise ValueError("vectors must be finite float32")
    except (OSError, SafetensorError, ValueError) as error:
        raise StorageError(
            f"{path}: not a part of a cache as this version writes it: {error}; remove this file"
        ) from None
    return list(row_of), vectors_NMD
