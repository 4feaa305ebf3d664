"""Items -> vectors in one process, with and without worker processes and a cache; ranks are in
tests/launcher/test_evaluate_on_ranks.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from agff.batch import Item
from agff.errors import DataError, StorageError
from data_pipeline.layouts.eval_items import EvalItem
from launcher.encoding import vector_cache
from launcher.encoding.items import batches_by_length, encode_items
from launcher.encoding.vector_cache import VectorCache, model_key
from tests.launcher.encoding.cases import cases
from tests.launcher.encoding.models import IMAGE, load_tiny, tiny_items, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("encoding"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return cases(folder)


def test_vectors_are_those_of_each_item_alone(folder: Path, alone: dict[str, Any]) -> None:
    model, items = load_tiny(folder), tiny_items(folder)
    expected_NMD = model.encode([item.load({}) for item in items], batch_size=1)
    vectors_NMD: Tensor = torch.tensor(alone["all"][0])
    torch.testing.assert_close(vectors_NMD, expected_NMD)
    assert alone["none"][0].shape[0] == 0
    by_workers = encode_items(model, items, batch_size=4, title="items", num_workers=2)
    assert torch.equal(by_workers.vectors, vectors_NMD)


def test_refused_items_are_named_and_have_zeros(folder: Path, alone: dict[str, Any]) -> None:
    vectors, refused = alone["refused"]
    assert sorted(refused) == [5, 6]
    assert "damaged.png: is a damaged PNG" in refused[5]
    assert "gone.png: is missing" in refused[6]
    assert not vectors[[5, 6]].any()
    assert (vectors[:5] ** 2).sum(-1) == pytest.approx(1, abs=1e-5)


def test_longest_items_come_first_and_share_batches(folder: Path) -> None:
    model, items = load_tiny(folder), tiny_items(folder)
    batches = batches_by_length(model, items, range(len(items)), batch_size=4)
    lengths = [model.processor.num_tokens(items[place].outline()) for batch in batches for place in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(place for batch in batches for place in batch) == list(range(len(items)))
    assert {len(batch) for batch in batches[:-1]} == {4}


def test_decoded_items_are_taken_too(folder: Path) -> None:
    model, items = load_tiny(folder), tiny_items(folder)
    decoded: list[Item] = [item.load({}) for item in items]
    found, expected = (encode_items(model, each, batch_size=4, title="x") for each in (decoded, items))
    assert torch.equal(found.vectors, expected.vectors)


def test_an_image_is_decoded_once_in_a_batch(folder: Path) -> None:
    opened: dict[Any, Image.Image] = {}
    items = [EvalItem(IMAGE, folder / "1.png"), EvalItem(f"{IMAGE}Or not?\n", folder / "1.png")]
    first, second = (item.load(opened).image for item in items)
    assert first is second


def test_random_state_is_left_as_it_is(folder: Path) -> None:
    before = torch.get_rng_state()
    model = load_tiny(folder)
    torch.set_rng_state(before)
    encode_items(model, tiny_items(folder), batch_size=4, title="x", num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_that_dies_is_named(folder: Path) -> None:
    class Deadly(EvalItem):
        def load(self, opened: Any) -> Item:
            raise SystemExit(9)

    with pytest.raises(DataError, match=r"a process that loads items died .* lower --num_workers"):
        encode_items(load_tiny(folder), [Deadly("a")], batch_size=4, title="x", num_workers=1)


class TestCache:
    """What is kept, and for whom."""

    def encode(self, folder: Path, cache: Path, *, seed: int = 0, max_tokens: int = 64) -> tuple[Tensor, int]:
        """(vectors, how many items the model encoded)."""
        model, count = load_tiny(folder, seed=seed, max_tokens=max_tokens), 0
        encode_inputs = model.encode_inputs

        def counted(inputs: Any) -> Tensor:
            nonlocal count
            count += len(inputs["input_ids"])
            return encode_inputs(inputs)

        model.encode_inputs = counted  # type: ignore[method-assign]
        found = encode_items(
            model, tiny_items(folder), batch_size=4, title="x", cache=VectorCache(cache, model)
        )
        return found.vectors, count

    def test_the_same_model_encodes_an_item_once(self, folder: Path, tmp_path: Path) -> None:
        first, count = self.encode(folder, tmp_path)
        assert count == len(tiny_items(folder))
        second, count = self.encode(folder, tmp_path)
        assert count == 0
        assert torch.equal(first, second)
        assert not list(tmp_path.rglob("*.partial"))

    @pytest.mark.parametrize("change", [{"seed": 1}, {"max_tokens": 60}], ids=["weights", "limits"])
    def test_another_model_finds_nothing(self, folder: Path, tmp_path: Path, change: dict[str, int]) -> None:
        self.encode(folder, tmp_path)
        found, count = self.encode(folder, tmp_path, **change)
        assert count == len(found)

    def test_another_image_under_the_same_name_is_encoded(self, folder: Path, tmp_path: Path) -> None:
        model, image = load_tiny(folder), tmp_path / "a.png"
        cache = VectorCache(tmp_path / "cache", model)
        vectors = []
        for colour in ("red", "blue"):
            Image.new("RGB", (56, 56), colour).save(image)
            found = encode_items(model, [EvalItem(IMAGE, image)], batch_size=1, title="x", cache=cache)
            vectors.append(found.vectors)
        assert not torch.allclose(vectors[0], vectors[1])

    def test_refused_items_are_not_kept(self, folder: Path, tmp_path: Path) -> None:
        model, items = load_tiny(folder), [EvalItem("a"), EvalItem(IMAGE, tmp_path / "late.png")]
        cache = VectorCache(tmp_path / "cache", model)
        assert set(encode_items(model, items, batch_size=2, title="x", cache=cache).refused) == {1}
        Image.new("RGB", (56, 56)).save(tmp_path / "late.png")
        found = encode_items(model, items, batch_size=2, title="x", cache=cache)
        assert not found.refused
        assert bool(found.vectors[1].any())

    @pytest.mark.parametrize("content", [b"", b"x" * 100], ids=["empty", "other bytes"])
    def test_a_damaged_part_is_named(self, folder: Path, tmp_path: Path, content: bytes) -> None:
        self.encode(folder, tmp_path)
        [part] = tmp_path.rglob("*.safetensors")
        part.write_bytes(content)
        with pytest.raises(StorageError, match=f"{part.name}: not a part of a cache .*; remove this file"):
            self.encode(folder, tmp_path)

    def test_vectors_of_other_items_are_not_read(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each of a benchmark's sets is a part, and each is looked for in all of them."""
        model, read = load_tiny(folder), list[str]()
        cache = VectorCache(tmp_path, model)

        @contextlib.contextmanager
        def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
            with safe_open(*arguments, **options) as file:

                def get_tensor(name: str) -> Tensor:
                    read.append(name)
                    return file.get_tensor(name)

                yield SimpleNamespace(get_tensor=get_tensor, get_slice=file.get_slice)

        monkeypatch.setattr(vector_cache, "safe_open", watched)
        for text in ("a", "b", "a"):
            encode_items(model, [EvalItem(text)], batch_size=1, title="x", cache=cache)
        assert read.count("keys") == 0 + 1 + 2
        assert read.count("vectors") == 1

    def test_a_place_that_cannot_be_written_is_named(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="vectors cannot be kept: Not a directory"):
            self.encode(folder, tmp_path / "file")

    def test_key_is_of_everything_that_makes_a_vector(self, folder: Path) -> None:
        changed = [load_tiny(folder), load_tiny(folder, seed=1), load_tiny(folder, max_tokens=32)]
        tokenizer = load_tiny(folder)
        tokenizer.processor.tokenizer.add_tokens(["qqq"])
        images = load_tiny(folder)
        images.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
        keys = {model_key(model) for model in (*changed, tokenizer, images)}
        assert len(keys) == 5
        assert model_key(load_tiny(folder)) in keys
