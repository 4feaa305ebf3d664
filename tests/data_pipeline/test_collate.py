"""Items -> distinct rows -> chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from agff.batch import IMAGE_PLACEHOLDER, Batch, Encoded, Item, ModelInputs
from agff.errors import DataError
from agff.objectives.contrastive import Contrastive
from agff.objectives.objective import Objective
from agff.similarity import FusionConfig
from agff.step import train_step
from data_pipeline.collate import Chunking, FixedRows, TokenBudget, collate
from data_pipeline.decode import Example
from data_pipeline.regions import content_id
from tests.agff.test_step import PlainEngine
from tests.agff.three_kinds import ThreeKinds
from tests.agff.tiny import IMAGE_TOKEN, PATCH_VALUES, VOCABULARY, chunk, tiny_model
from tests.ranks import run_ranks

CHUNKINGS = st.one_of(
    st.builds(FixedRows, rows=st.integers(1, 40)), st.builds(TokenBudget, max_tokens=st.integers(40, 200))
)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=30), chunking=CHUNKINGS)
def test_every_row_is_in_one_chunk_and_the_longest_come_first(lengths: list[int], chunking: Chunking) -> None:
    chunks = chunking.cut(lengths)
    assert sorted(index for part in chunks for index in part) == list(range(len(lengths)))
    assert all(chunks)
    for first, second in itertools.pairwise(chunks):
        assert max(lengths[i] for i in second) <= min(lengths[i] for i in first)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), rows=st.integers(1, 40))
def test_the_number_of_chunks_of_fixed_rows_follows_from_the_number_of_rows(
    lengths: list[int], rows: int
) -> None:
    chunks = FixedRows(rows=rows).cut(lengths)
    assert len(chunks) == -(-len(lengths) // rows)
    assert all(len(part) == rows for part in chunks[:-1])


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), budget=st.integers(40, 200))
def test_a_token_budget_holds_for_every_chunk_whose_padding_is_less_than_half(
    lengths: list[int], budget: int
) -> None:
    chunks = TokenBudget(max_tokens=budget).cut(lengths)
    longest = [max(lengths[i] for i in part) for part in chunks]
    for most, part in zip(longest, chunks, strict=True):
        assert len(part) * most <= budget
        assert 2 * min(lengths[i] for i in part) >= most
    for (most, following), part in zip(itertools.pairwise(longest), chunks[:-1], strict=True):
        assert (len(part) + 1) * most > budget or 2 * following < most, "as many as fit"


# ------------------------------------------------------------------ an item that occurs twice


@dataclass(frozen=True)
class Letters:
    """Items -> inputs of the tiny model: a letter is a token, an image the patches that its colour seeds."""

    num_fine: int

    def num_tokens(self, item: Item) -> int:
        return len(self._text(item)) + (item.image is not None) + 1 + self.num_fine

    def __call__(self, items: Sequence[Item]) -> ModelInputs:
        texts = [[ord(letter) % 30 for letter in self._text(item)] for item in items]
        return chunk(texts, [self._patches(item.image) for item in items], self.num_fine)

    def _text(self, item: Item) -> str:
        return item.text.replace(IMAGE_PLACEHOLDER, "")

    def _patches(self, image: Image.Image | None) -> Tensor | None:
        if image is None:
            return None
        red, _, _ = image.getpixel((0, 0))  # type: ignore[misc]
        return torch.randn(4, PATCH_VALUES, generator=torch.Generator().manual_seed(int(red)))


def item(text: str, red: int | None = None) -> tuple[Item, int]:
    """An item and its content id. red: of its image."""
    if red is None:
        return Item(text=text), content_id(text, None)
    text = f"{IMAGE_PLACEHOLDER}{text}"
    return Item(text=text, image=Image.new("RGB", (2, 2), (red, 0, 0))), content_id(text, bytes([red]))


PAIRS = [
    (item("which", 1), item("dog")),
    (item("which", 2), item("cat")),
    (item("which", 3), item("dog")),  # the class of the first one, on the same rank of two
    (item("that", 3), item("hat", 4)),  # the image of the one before, with another text
    (item("mat"), item("pat", 5)),
    (item("which", 6), item("dog")),  # and once more, on the other rank
    (item("mat"), item("far away", 7)),  # the query of the one before the last
    (item("a fat cow"), item("mat")),  # that query as target
]
NEGATIVES = {
    0: [item("cat")],
    2: [item("cat"), item("nor this"), item("dog")],
    3: [item("mat")],
    6: [item("no such thing")],
}
"""By pair: the first two of them are the second pair's target, and the third pair's last is its own."""


def example(pair: int) -> Example:
    (query, query_id), (target, target_id) = PAIRS[pair]
    negatives = NEGATIVES.get(pair, ())
    return Example(
        query=query,
        target=target,
        negatives=tuple(item for item, _ in negatives),
        query_id=query_id,
        target_id=target_id,
        negative_ids=tuple(content_id for _, content_id in negatives),
        address=f"pairs:{pair}",
    )


def each_item_for_itself(examples: Sequence[Example], process: Letters) -> Batch:
    """One row for each item; what is masked is as ever."""
    apart = [
        replace(
            example,
            query_id=9 * place,
            target_id=9 * place + 1,
            negative_ids=tuple(9 * place + 2 + n for n in range(len(example.negatives))),
        )
        for place, example in enumerate(examples)
    ]
    return replace(
        collate(apart, process, chunking=FixedRows(rows=100)),
        query_ids_B=torch.tensor([example.query_id for example in examples]),
        target_ids_B=torch.tensor([example.target_id for example in examples]),
        negative_ids_N=torch.tensor([number for e in examples for number in e.negative_ids]),
    )


class AllInFloat64(torch.nn.Module):
    """Rows of letters and patches -> M vectors. (Qwen2-VL's norms and its rotation of image positions round
    to float32.)"""

    def __init__(self, num_fine: int) -> None:
        super().__init__()
        self.num_fine = num_fine
        torch.manual_seed(0)
        self.letters = torch.nn.Embedding(VOCABULARY + 1 + num_fine, 16)
        self.patches = torch.nn.Linear(4 * PATCH_VALUES, 16)
        self.vectors = torch.nn.Linear(16, (1 + num_fine) * 8)

    def forward(self, inputs: ModelInputs) -> Encoded:
        length_B = inputs["prompt_start_B"] + 1 + self.num_fine
        mask_BT = torch.arange(inputs["input_ids"].shape[1]) < length_B[:, None]
        state_BTH = self.letters(inputs["input_ids"]) * mask_BT[..., None]
        pixels = inputs["pixel_values"].to(state_BTH.dtype).reshape(-1, 4 * PATCH_VALUES)
        has_image_B = ((inputs["input_ids"] == IMAGE_TOKEN) & mask_BT).any(dim=1)
        image_BH = torch.zeros_like(state_BTH[:, 0])
        if has_image_B.any():
            image_BH[has_image_B] = self.patches(pixels)
        vectors = self.vectors((state_BTH.sum(dim=1) + image_BH).tanh())
        return {"embedding": torch.nn.functional.normalize(vectors.unflatten(1, (-1, 8)), dim=-1)}


FUSED, THREE = Contrastive(amplification=2.0, bidirectional=True), ThreeKinds()
SHARED_CHUNKINGS = (FixedRows(rows=1), FixedRows(rows=3), FixedRows(rows=100), TokenBudget(max_tokens=22))
SHARED_CASES: list[tuple[Callable[[int], torch.nn.Module], Chunking, Objective, int, float]] = [
    *(
        (AllInFloat64, chunking, FUSED, num_fine, 1e-12)
        for chunking in SHARED_CHUNKINGS
        for num_fine in (0, 3)
    ),
    (AllInFloat64, FixedRows(rows=3), Contrastive(amplification=0.0), 3, 1e-12),
    (tiny_model, FixedRows(rows=3), FUSED, 3, 1e-6),
    (lambda num_fine: tiny_model(num_fine, head=THREE.build_head(None)), FixedRows(rows=3), THREE, 3, 1e-6),
]
"""(model, chunks, objective, fine-grained vectors, tolerance relative to a parameter's largest gradient)"""


def losses_and_gradients(*, is_shared: bool) -> list[tuple[float, dict[str, Tensor]]]:
    """Of each case: the loss of this rank's pairs and the gradient of every parameter."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    found = []
    for build_model, chunking, objective, num_fine, _ in SHARED_CASES:
        examples, process = [example(n) for n in range(rank, len(PAIRS), world_size)], Letters(num_fine)
        batch = (
            collate(examples, process, chunking=chunking)
            if is_shared
            else each_item_for_itself(examples, process)
        )
        eligible_B = torch.tensor([e.address in ("pairs:0", "pairs:2", "pairs:6") for e in examples])
        batch = replace(batch, pair_data={"eligible": eligible_B.float()})
        engine = PlainEngine(build_model(num_fine))
        loss = train_step(engine, objective, FusionConfig(), batch).loss.item()
        named = engine.model.named_parameters()
        found.append((loss, {name: p.grad for name, p in named if p.grad is not None}))
    return found


def shared() -> list[tuple[float, dict[str, Tensor]]]:
    return losses_and_gradients(is_shared=True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_item_that_occurs_twice_is_encoded_once_and_its_gradients_add_up(world_size: int) -> None:
    """On two ranks they have different numbers of rows, and of chunks."""
    results = [shared()] if world_size == 1 else run_ranks(shared, world_size=2)
    for index, (expected_loss, expected) in enumerate(losses_and_gradients(is_shared=False)):
        found_loss = sum(result[index][0] for result in results) / world_size
        assert found_loss == pytest.approx(expected_loss, abs=1e-12)
        found, tolerance = results[0][index][1], SHARED_CASES[index][-1]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            most = tolerance * gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=most, msg=f"{index}: {name}")


def test_the_pairs_share_items_on_every_side_and_ranks_have_different_numbers_of_rows() -> None:
    def num_rows(numbers: range) -> int:
        batch = collate([example(n) for n in numbers], Letters(0), chunking=FixedRows(rows=1))
        assert len(batch.chunks) == len(set(batch.row_of_item_R.tolist()))
        return len(batch.chunks)

    assert num_rows(range(8)) == 22 - 8
    assert (num_rows(range(0, 8, 2)), num_rows(range(1, 8, 2))) == (13 - 4, 9 - 1)


def test_equal_ids_of_different_items_are_named() -> None:
    examples = [example(0), replace(example(1), target_id=example(0).query_id)]
    with pytest.raises(DataError, match=r"has the content id \d+ of another item .*verify.py --deep"):
        collate(examples, Letters(0), chunking=FixedRows(rows=4))


class Captioned:
    """What an objective may ask for: other items, and values of a pair."""

    def items_of_pair(self, source: str, query: Item, target: Item) -> tuple[Item, Item]:
        return replace(query, caption=f"{source}: {target.text}"), target

    def pair_data_of(self, source: str, query: Item, target: Item) -> Mapping[str, float]:
        return {"has_image": query.image is not None, "length": len(target.text)}


def test_an_objective_sees_each_pair_before_its_items_become_rows() -> None:
    def captioned(pair: int) -> Example:
        return replace(example(pair), source="pets").seen_by(Captioned())

    # pairs 4 and 6 have one query, but now with two captions
    batch = collate([captioned(n) for n in (3, 4, 6)], Letters(0), chunking=FixedRows(rows=9))
    assert len(set(batch.row_of_item_R.tolist())) == 8, "6 items, 2 negatives"
    assert batch.query_ids_B[1] == batch.query_ids_B[2]
    assert batch.pair_data["has_image"].tolist() == [True, False, False]
    assert batch.pair_data["length"].tolist() == [len(PAIRS[n][1][0].text) for n in (3, 4, 6)]
    assert captioned(4).query.caption == f"pets: {PAIRS[4][1][0].text}"


def test_the_same_image_with_another_region_is_another_row() -> None:
    pair = example(0)
    regions = [replace(pair, query=replace(pair.query, box=(0.0, 0.0, x, 2.0))) for x in (1.0, 2.0, 2.0)]
    batch = collate(regions, Letters(0), chunking=FixedRows(rows=9))
    first, second, third = batch.row_of_item_R[:3].tolist()
    assert first != second == third


def test_vectors_of_a_teacher_come_with_their_pair() -> None:
    vectors = np.arange(12, dtype=np.float16).reshape(2, 2, 3)
    examples = [replace(example(n), vectors=vectors[n]) for n in range(2)]
    data = collate(examples, Letters(0), chunking=FixedRows(rows=9)).pair_data
    assert data["query_teacher"].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert data["target_teacher"].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert data["query_teacher"].dtype == torch.float32
    assert data["target_teacher"].is_contiguous()
