"""Weights written to safetensors and read back one tensor at a time: memory does not grow with the model.

A file's header, which has names, shapes and places, is known before any tensor is read, so it is written
first. The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agff.errors import CheckpointError
from agff.lazy_tensor import LazyTensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""As the format spells them."""
ALIGNMENT = 8
"""Bytes; of the beginning of the tensors."""

Transform = Callable[[LazyTensor], LazyTensor]
"""What is written in place of a tensor."""


@dataclass(frozen=True)
class WrittenWeights:
    """What is now in a folder."""

    tensors: dict[Path, dict[str, int]] = field(default_factory=dict)
    """CRC-32 of the bytes of each tensor of a file, by its name, as torch.save keeps it of its own."""
    files: dict[str, str] = field(default_factory=dict)
    """Size and SHA-256 of each file, as `agff.files.file_fingerprint`, by its name in the folder."""


def write_weights(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: torch.dtype,
    shard_bytes: int | None = None,
    stem: str = "model",
) -> WrittenWeights:
    """Write all tensors, in their order and rounded to `dtype`, to `folder`/`stem`.safetensors, or, where
    they are more than `shard_bytes`, to several files and an index, as transformers names them.

    One tensor is in memory at a time, or two that together are no larger than the largest. The caller syncs
    the files. Raises CheckpointError for a tensor that is not of its shape, OSError where the folder cannot
    be written.
    """
    shards = _shards(tensors, shard_bytes=shard_bytes, itemsize=dtype.itemsize)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [stem]
    written = WrittenWeights()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for name, shard in zip(names, shards, strict=True):
            path = folder / f"{name}.safetensors"
            written.files[path.name] = _write_shard(path, shard, dtype, pool, written)
    if len(shards) > 1:
        _write_index(folder / f"{stem}.safetensors.index.json", names, shards, dtype)
    return written


def _shards(
    tensors: Mapping[str, LazyTensor], *, shard_bytes: int | None, itemsize: int
) -> list[dict[str, LazyTensor]]:
    """In order; a tensor larger than a shard has one of its own."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.shape.numel() * itemsize
        if room is not None and shard_bytes is not None:
            if size > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            room -= size
        shards[-1][name] = tensor
    return shards


def _write_shard(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    pool: ThreadPoolExecutor,
    written: WrittenWeights,
) -> str:
    """Its fingerprint. Both hashes of a tensor's bytes are made while they are written."""
    whole = hashlib.sha256()
    hashes = written.tensors[path] = {}
    with path.open("wb") as file:
        header = _header(tensors, dtype)
        file.write(header)
        whole.update(header)
        for name, tensor in _read_ahead(tensors, pool):
            content = _bytes(tensor.to(dtype))
            of_whole: Future[Any] = pool.submit(whole.update, content)
            file.write(content)
            hashes[name] = zlib.crc32(content)
            of_whole.result()
            del tensor, content  # before the next one is made, which takes two of adapters that are merged
        size = file.tell()
    return f"{size} bytes, sha256 {whole.hexdigest()}"


def _read_ahead(tensors: Mapping[str, LazyTensor], pool: ThreadPoolExecutor) -> Iterator[tuple[str, Tensor]]:
    """Each of them; the next one is read while the caller has this one, where there is room for it."""
    items = list(tensors.items())
    largest = max((lazy.shape.numel() for lazy in tensors.values()), default=0)
    ahead: Future[Tensor] | None = None
    for (name, lazy), following in itertools.zip_longest(items, items[1:]):
        tensor = _checked(name, lazy) if ahead is None else ahead.result()
        ahead = None
        if following and lazy.shape.numel() + following[1].shape.numel() <= largest:
            ahead = pool.submit(_checked, *following)
        yield name, tensor
        del tensor


def _checked(name: str, lazy: LazyTensor) -> Tensor:
    tensor = lazy.read()
    if tensor.shape != lazy.shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"{name}: is {tensor.dtype} {list(tensor.shape)}, must be floating-point {list(lazy.shape)}"
        )
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.shape.numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_index(
    path: Path, names: Sequence[str], shards: Sequence[Mapping[str, LazyTensor]], dtype: torch.dtype
) -> None:
    sizes = [tensor.shape.numel() for shard in shards for tensor in shard.values()]
    places = {
        tensor: f"{name}.safetensors" for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    values = {"metadata": {"total_size": sum(sizes) * dtype.itemsize}, "weight_map": places}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_written(written: WrittenWeights) -> None:
    """Read every tensor back by its name, as any program would, and compare its hash with that of what was
    written. Two are in memory at a time. Raises CheckpointError, with a line for each that differs."""
    with ThreadPoolExecutor(2) as pool:
        places = [(path, *each) for path, hashes in written.tensors.items() for each in hashes.items()]
        found = pool.map(lambda place: _difference(*place), places)
        if problems := [
            f"{path}: {name} read back differs from what was written: {problem}"
            for (path, name, _), problem in zip(places, found, strict=True)
            if problem
        ]:
            raise CheckpointError("\n".join(problems) + "\nnothing was released; is the disk sound?")
    for path, hashes in written.tensors.items():
        if unknown := [name for name in _names(path) if name not in hashes]:
            raise CheckpointError(f"{path}: holds {', '.join(unknown)}, which was not written")


def _difference(path: Path, name: str, expected: int) -> str:
    try:
        with safe_open(path, "pt") as file:  # opened again for each: no page of another tensor stays mapped
            found = zlib.crc32(_bytes(file.get_tensor(name)))
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})"
    return "" if found == expected else f"CRC-32 {found:08x} is not {expected:08x}"


def _names(path: Path) -> Iterator[str]:
    with safe_open(path, "pt") as file:
        yield from file.keys()
