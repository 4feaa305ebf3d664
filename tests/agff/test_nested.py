"""Truncations of the vectors: their loss is that of the truncated items, computed by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from agff.batch import Batch
from agff.errors import ConfigError
from agff.nested import Truncation, Truncations
from agff.objectives.contrastive import Contrastive
from agff.objectives.nested import truncations_of
from agff.objectives.objective import ObjectiveResult
from agff.similarity import FusionConfig
from tests.agff.test_objectives import Cosine

NUM_PAIRS, NUM_NEGATIVES, NUM_FINE, WIDTH = 4, 3, 3, 8


def sides() -> list[Tensor]:
    """Unit vectors of queries, targets and explicit negatives, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, 1 + NUM_FINE, WIDTH) for count in (NUM_PAIRS, NUM_PAIRS, NUM_NEGATIVES)]
    return [
        normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1) for shape in shapes
    ]


def batch() -> Batch:
    ids = torch.arange(NUM_PAIRS)
    return Batch(
        chunks=(),
        row_of_item_R=torch.arange(2 * NUM_PAIRS + NUM_NEGATIVES),
        query_ids_B=ids,
        target_ids_B=ids + 10,
        negative_ids_N=torch.arange(NUM_NEGATIVES) + 20,
        addresses=("",) * NUM_PAIRS,
        filler={},
    )


def result_of(objective: Contrastive, vectors: list[Tensor]) -> ObjectiveResult:
    encoded: list[Any] = [{"embedding": side} for side in vectors]
    return objective(*encoded, batch(), FusionConfig(beta=0.2))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("dims", "fine", "weights"),
    [
        ([2, 5], [], []),
        ([], [0, 2], [0.5, 2.0]),
        ([2, 5], [0, 1], [0.25, 0.5, 2.0, 3.0]),
        ([4, WIDTH], [NUM_FINE], [1.0, 3.0, 0.5]),  # whole items with a weight of their own
    ],
)
def test_the_loss_is_the_weighted_mean_of_losses_computed_by_themselves(
    dims: list[int], fine: list[int], weights: list[float], bidirectional: bool
) -> None:
    settings: dict[str, Any] = {"temperature": 0.3, "bidirectional": bidirectional, "num_hardest": 4}
    vectors = [side.requires_grad_() for side in sides()]
    total, pairs, norm = torch.zeros((), dtype=torch.float64), torch.zeros(NUM_PAIRS), 0.0
    by_size = dict(zip([*[("dim", d) for d in dims], *[("fine", f) for f in fine]], weights, strict=False))
    for dim, num_fine in itertools.product({*dims, WIDTH}, {*fine, NUM_FINE}):
        weight = by_size.get(("dim", dim), 1.0) * by_size.get(("fine", num_fine), 1.0)
        cut = [side[:, : 1 + num_fine, :dim] for side in vectors]
        if dim < WIDTH:  # whole vectors come as unit vectors, with the gradient of that
            cut = [side / side.norm(dim=-1, keepdim=True) for side in cut]
        alone = result_of(Contrastive(**settings), cut)
        total, norm = total + weight * alone.loss, norm + weight
        pairs = pairs + weight * alone.pair_loss_B
    expected = torch.autograd.grad(total / norm, vectors)
    nested = Contrastive(nested_dims=dims, nested_fine=fine, nested_weights=weights, **settings)
    found = result_of(nested, vectors)
    torch.testing.assert_close(found.loss, total / norm, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.pair_loss_B, pairs / norm, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found.loss, vectors)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
    assert found.metrics == result_of(Contrastive(**settings), vectors).metrics, "of whole items"


def test_without_truncations_nothing_changes() -> None:
    plain = Contrastive()
    query, target, negative = ({"embedding": side} for side in sides())
    seen = []

    def loss_of(*encoded: Any) -> Any:
        seen.extend(encoded)
        return "the result"

    assert plain.nested_result(loss_of, query, target, negative) == "the result"  # type: ignore[comparison-overlap]
    assert seen[0] is query


def test_other_outputs_of_the_model_stay_whole() -> None:
    tokens = torch.randn(NUM_PAIRS, WIDTH)
    cut = Truncation(dim=2, num_fine=0).of_encoded({"embedding": sides()[0], "tokens": tokens})
    assert cut["tokens"] is tokens
    assert cut["embedding"].shape == (NUM_PAIRS, 1, 2)


def test_whole_items_are_not_normalised_again() -> None:
    vectors = sides()[0] * 0.9
    assert torch.equal(Truncation(dim=WIDTH, num_fine=NUM_FINE)(vectors), vectors)
    assert torch.equal(Truncation(dim=WIDTH, num_fine=1)(vectors), vectors[:, :2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nested_dims": [4, 2]}, r"loss.nested_dims=\[4, 2\] must increase"),
        ({"nested_dims": [4, 4]}, r"loss.nested_dims=\[4, 4\] must increase"),
        ({"nested_dims": [0, 4]}, r"loss.nested_dims=\[0, 4\] must be >= 1"),
        ({"nested_fine": [2, 1]}, r"loss.nested_fine=\[2, 1\] must increase"),
        ({"nested_fine": [-1]}, r"loss.nested_fine=\[-1\] must be >= 0"),
        (
            {"nested_dims": [4], "nested_fine": [0], "nested_weights": [1.0]},
            r"nested_weights=\[1.0\] must have 2 numbers: one for each of nested_dims=\[4\], then of",
        ),
        ({"nested_weights": [1.0]}, r"nested_weights=\[1.0\] must have 0 numbers"),
        ({"nested_dims": [4], "nested_weights": [0.0]}, r"nested_weights=\[0.0\] must be > 0"),
    ],
)
def test_settings_that_make_no_truncations_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Contrastive(**settings)


class Config:
    """Of a backbone whose vectors have 16 numbers."""

    hidden_size = 16

    def get_text_config(self) -> Config:
        return self


def test_what_is_longer_than_the_whole_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"loss.nested_dims=\[8, 17\] must be <= 16, the numbers of a vector"
    ):
        Contrastive(nested_dims=[8, 17]).check_backbone(Config())
    Contrastive(nested_dims=[8, 16]).check_backbone(Config())
    with pytest.raises(ConfigError, match=r"loss.nested_fine=\[0, 5\] must be <= prompts.num_fine=4"):
        Contrastive(nested_fine=[0, 5]).check_sizes(global_batch_size=64, num_fine=4)
    Contrastive(nested_fine=[0, 4]).check_sizes(global_batch_size=64, num_fine=4)


def test_a_model_knows_what_it_was_trained_for() -> None:
    nested = Contrastive(nested_dims=[4], nested_fine=[0, 2])
    assert truncations_of(nested) == Truncations(dims=[4], fine=[0, 2])
    assert truncations_of(Cosine()) == truncations_of(Contrastive()) == Truncations()
    assert Truncations().all(width=8, num_fine=4) == []
    found = [(cut.dim, cut.num_fine) for cut in truncations_of(nested).all(width=8, num_fine=4)]
    assert found == [(8, 4), (8, 2), (8, 0), (4, 4), (4, 2), (4, 0)]
