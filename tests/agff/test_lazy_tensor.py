from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agff import lazy_tensor
from agff.backbone_folder import lazy_tensors
from agff.checkpoint_folder import check_checkpoint
from agff.errors import CheckpointError, ConfigError
from agff.lazy_tensor import (
    LazyTensor,
    Piece,
    TorchFile,
    damaged_records,
    elements,
    of_pieces,
    of_safetensors,
    of_tensor,
)

TENSOR = torch.arange(33, dtype=torch.float32).view(11, 3)


def pieces_of(folder: Path) -> list[Piece]:
    """Cut inside of rows, each behind 8 other bytes."""
    pieces = []
    for index, part in enumerate(TENSOR.flatten().split([10, 13, 10])):
        path = folder / f"{index}.bin"
        path.write_bytes(bytes(8) + part.numpy().tobytes())
        pieces.append(Piece(path, 8, part.numel(), torch.float32))
    return pieces


def lazy_of(kind: str, folder: Path) -> LazyTensor:
    if kind == "pieces":
        return of_pieces(TENSOR.shape, pieces_of(folder))
    if kind == "safetensors":
        save_file({"other": torch.ones(2), "table": TENSOR}, folder / "table.safetensors")
        return of_safetensors(folder / "table.safetensors")["table"]
    return of_tensor(TENSOR)


@pytest.mark.parametrize("kind", ["pieces", "safetensors", "memory"])
@pytest.mark.parametrize("num_rows", [11, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_grows_without_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, num_rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(lazy_tensor, "ROWS_AT_ONCE", 4)
    lazy = lazy_of(kind, tmp_path)
    assert torch.equal(lazy.read(), TENSOR)
    if lazy.read_rows is not None:
        rows, by_rows, at_once = lazy.read_rows, lazy, list[int]()

        def counted(start: int, stop: int) -> torch.Tensor:
            at_once.append(stop - start)
            return rows(start, stop)

        lazy = LazyTensor(by_rows.shape, pytest.fail, counted)  # never whole
    grown = lazy.grown(num_rows, dtype=dtype)
    assert torch.equal(grown[:11].float(), TENSOR), "small whole numbers are exact in both"
    assert (grown.shape, grown.dtype) == ((num_rows, 3), dtype)
    assert not grown[11:].any()
    grown.zero_()
    assert TENSOR.any(), "the copy is the caller's own"
    if kind != "memory":
        assert max(at_once) == 4


def test_elements_beyond_the_end_are_missing_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2\.bin: ends 2 elements before the parameters do"):
        elements(pieces_of(tmp_path), 30, 5)


def test_no_flipped_bit_changes_what_is_read_unseen(tmp_path: Path) -> None:
    """Of every byte but those of the tensors: the zip archive around them says where they lie. Damage is
    named, whatever torch and zipfile make of it, or it changes nothing."""
    folder, tensors = tmp_path / "checkpoints/step-000001", [torch.arange(100.0), torch.arange(50.0)]
    folder.mkdir(parents=True)
    torch.save(tensors, path := folder / "whole.pt")
    content = path.read_bytes()
    files = {path.name: f"{len(content)} bytes, sha256 of no importance"}
    (folder / "state.json").write_text(json.dumps({"step": 1, "world_size": 1, "files": files}))

    def problems_or_tensors() -> list[str] | list[torch.Tensor]:
        if found := check_checkpoint(tmp_path, 1, hashes=False):
            return found
        try:
            stored = TorchFile(path).content
        except CheckpointError as error:
            return [str(error)]
        return damaged_records([each.piece for each in stored]) or [each.lazy.read() for each in stored]

    assert all(torch.equal(*pair) for pair in zip(problems_or_tensors(), tensors, strict=True))
    inside = {place for tensor in tensors for place in _places(content, tensor.numpy().tobytes())}
    noticed = 0
    for place in range(len(content)):
        if place not in inside:
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            found = problems_or_tensors()
            if isinstance(found[0], str):
                noticed += str(path) in found[0]
            else:
                assert all(torch.equal(*pair) for pair in zip(found, tensors, strict=True)), place
    assert noticed > 300


def _places(content: bytes, part: bytes) -> range:
    start = content.index(part)
    return range(start, start + len(part))


def test_a_file_that_is_gone_when_it_is_read_is_named(tmp_path: Path) -> None:
    lazy = lazy_of("safetensors", tmp_path)
    (tmp_path / "table.safetensors").unlink()
    assert lazy.read_rows is not None
    for read in (lazy.read, lambda: lazy.grown(11, dtype=torch.float32)):
        with pytest.raises(CheckpointError, match=r"table\.safetensors: cannot be read: No such file"):
            read()


def test_weights_in_the_format_of_before_zip_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": TENSOR}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: cannot be read: File is not a zip file"):
        lazy_tensors(tmp_path)
