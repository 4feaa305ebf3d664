from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agff import lazy_tensor
from agff.errors import CheckpointError
from agff.lazy_tensor import LazyTensor, Piece, elements, of_pieces, of_safetensors, of_tensor

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
