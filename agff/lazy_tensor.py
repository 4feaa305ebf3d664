"""Tensors that stay on disk until they are needed: of torch's files and of safetensors. What is read is one
tensor or some of its rows, so that memory holds what is in use and no more."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agff.errors import CheckpointError

ROWS_AT_ONCE = 4096
"""Of a tensor that is read by rows: 16 MiB of an embedding table of width 1,024."""
DESCRIPTOR_BYTES = 24
"""At most, behind a part of a zip archive."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is asked for."""

    shape: torch.Size
    read: Callable[[], Tensor]
    """The tensor on the CPU; not to be changed in place, since it may be somebody's."""
    read_rows: Callable[[int, int], Tensor] | None = None
    """Rows `start` to `stop` of it, and no others; None: it is read whole."""

    def grown(self, num_rows: int, *, dtype: torch.dtype) -> Tensor:
        """The caller's own copy with this many rows, zeros behind those it has. No second copy is made
        where it can be read by rows."""
        whole = self.read() if self.read_rows is None else None
        grown = torch.zeros(num_rows, *self.shape[1:], dtype=dtype)
        for start in range(0, self.shape[0], ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, self.shape[0])
            grown[start:stop] = self._rows(whole, start, stop)
        return grown

    def _rows(self, whole: Tensor | None, start: int, stop: int) -> Tensor:
        if self.read_rows is not None:
            return self.read_rows(start, stop)
        assert whole is not None
        return whole[start:stop]


def of_tensor(tensor: Tensor) -> LazyTensor:
    """One that is in memory."""
    return LazyTensor(tensor.shape, lambda: tensor.detach().cpu())


@dataclass(frozen=True)
class Piece:
    """Elements that lie one behind the other in a file."""

    path: Path
    start: int
    """Of its first byte."""
    num_elements: int
    dtype: torch.dtype

    def part(self, start: int, num_elements: int) -> Piece:
        """Elements `start` to `start + num_elements` of it. Raises CheckpointError beyond its end."""
        if start + num_elements > self.num_elements:
            raise CheckpointError(
                f"{self.path}: holds {self.num_elements} elements where the model's shapes ask for "
                f"{start + num_elements}; it is of another model or damaged"
            )
        return Piece(self.path, self.start + start * self.dtype.itemsize, num_elements, self.dtype)


def of_pieces(shape: torch.Size, pieces: Sequence[Piece]) -> LazyTensor:
    """The pieces, one behind the other; what the last ones hold beyond the shape is padding."""
    width = math.prod(shape[1:])

    def rows(start: int, stop: int) -> Tensor:
        part = torch.Size((stop - start, *shape[1:]))
        return _read(part, elements(pieces, start * width, part.numel()))

    return LazyTensor(shape, lambda: _read(shape, pieces), rows)


def elements(pieces: Sequence[Piece], start: int, size: int) -> list[Piece]:
    """Elements `start` to `start + size` of pieces that lie one behind the other. Raises CheckpointError
    where there are fewer."""
    found = []
    for piece in pieces:
        count = min(size, piece.num_elements - start)
        if count > 0:
            found.append(piece.part(start, count))
            size -= count
        start = max(0, start - piece.num_elements)
    if size:
        raise CheckpointError(
            f"{pieces[-1].path}: ends {size} elements before the parameters do that it should hold; it is of "
            "another model or damaged"
        )
    return found


def _read(shape: torch.Size, pieces: Sequence[Piece]) -> Tensor:
    tensor = torch.empty(shape, dtype=pieces[0].dtype)
    flat, done = tensor.view(-1), 0
    for piece in pieces:
        part = flat[done : done + piece.num_elements]
        done += part.numel()
        try:
            with piece.path.open("rb", buffering=0) as file:
                file.seek(piece.start)
                _fill(file, memoryview(part.view(torch.uint8).numpy().data), piece.path)
        except OSError as error:
            raise CheckpointError(f"{piece.path}: cannot be read: {error}") from None
    if done != flat.numel():
        raise CheckpointError(f"{pieces[0].path}: has {done} of {flat.numel()} elements of a tensor")
    return tensor


def _fill(file: Any, view: memoryview, path: Path) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path}: ends {len(view)} bytes too early")
        view = view[count:]


class TorchFile:
    """What torch.save wrote, with a Piece in place of each tensor.

    Unpickled without running its code: DeepSpeed's own objects in it become `Stand`s, and what else torch's
    `weights_only` does not know is refused."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when it cannot be read, or anything but its tensors is not what was
        written: of those, `damaged_records` says it."""
        self.path = path
        try:
            _check_structure(path)
            with FakeTensorMode(), torch.serialization.safe_globals(_STAND_INS):
                self._content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle raises
            first = next((line for line in str(error).splitlines() if line), type(error).__name__)
            raise CheckpointError(f"{path}: cannot be read: {first}") from None
        self.content = _map_tensors(self._content, self.piece)

    def piece(self, tensor: Tensor) -> Piece:
        """Where a tensor lies."""
        storage: Any = tensor.untyped_storage()
        start: int = storage._checkpoint_offset if tensor.numel() else 0
        if not tensor.is_contiguous():
            raise CheckpointError(
                f"{self.path}: holds a tensor of strides {tensor.stride()}, not in one piece"
            )
        return Piece(
            self.path, start + int(tensor.storage_offset()) * tensor.itemsize, tensor.numel(), tensor.dtype
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a TorchFile: its piece and its shape."""

    piece: Piece
    shape: torch.Size

    @property
    def lazy(self) -> LazyTensor:
        """To be read."""
        return of_pieces(self.shape, [self.piece])


def _map_tensors(value: Any, piece: Callable[[Tensor], Piece]) -> Any:
    if isinstance(value, Tensor):
        return StoredTensor(piece(value), value.shape)
    if isinstance(value, Mapping):
        return {name: _map_tensors(part, piece) for name, part in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return [_map_tensors(part, piece) for part in value]
    return value


class Stand:
    """In place of an object of DeepSpeed's, of which nothing is needed."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


_DEEPSPEED = "deepspeed.runtime"
_STAND_INS: list[Any] = [
    (int, f"{_DEEPSPEED}.zero.config.ZeroStageEnum"),
    (Stand, f"{_DEEPSPEED}.fp16.loss_scaler.LossScaler"),
    (Stand, f"{_DEEPSPEED}.fp16.loss_scaler.DynamicLossScaler"),
    (Stand, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Stand, "deepspeed.utils.tensor_fragment.tensor_fragment"),
]
"""What DeepSpeed's files hold beside tensors and plain values, by its name there."""


def _check_structure(path: Path) -> None:
    """Raise an error of any kind unless each part of the file that is no storage, from the pickle to the
    alignment that the places of tensors are computed with, has the CRC-32 that torch.save stored."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" not in record.filename:
                archive.read(record)


def damaged_records(pieces: Sequence[Piece]) -> list[str]:
    """One line for each file of torch.save's in which a storage that the pieces are of is not what was
    written: its CRC-32, which torch.save stores, differs. Reads those storages whole, and no others."""
    starts: dict[Path, set[int]] = {}
    for piece in pieces:
        starts.setdefault(piece.path, set()).add(piece.start)
    return [problem for path, found in starts.items() for problem in _damaged(path, found)]


def _damaged(path: Path, starts: set[int]) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
            for record, end in zip(records, ends, strict=True):
                start = _content_start(file, record)
                if not 0 <= end - start - record.file_size <= DESCRIPTOR_BYTES:
                    raise zipfile.BadZipFile(f"{record.filename} is not where the other parts leave room")
                if any(start <= used < end for used in starts):
                    with archive.open(record) as content:
                        while content.read(2**22):
                            pass
    except Exception as error:  # whatever zipfile raises for damage, an EOFError or RuntimeError too
        return [f"{path}: damaged: {error or type(error).__name__}"]
    return []


def _content_start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Behind the header before it, whose last four bytes but for a name and a filling are their lengths."""
    file.seek(record.header_offset + 26)
    return record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def of_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file by name. The file is mapped, which saves a copy (0.5 s for each GB); it is opened
    once more for each tensor, so that no page of another one stays mapped.

    Raises OSError or SafetensorError; a tensor that can no longer be read when it is asked for,
    CheckpointError."""

    def tensor(name: str) -> Tensor:
        with _readable(path), safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def rows(name: str, start: int, stop: int) -> Tensor:
        with _readable(path), safe_open(path, "pt") as file:
            return file.get_slice(name)[start:stop]

    with safe_open(path, "pt") as file:
        shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {
        name: LazyTensor(shape, partial(tensor, name), partial(rows, name)) for name, shape in shapes.items()
    }


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
