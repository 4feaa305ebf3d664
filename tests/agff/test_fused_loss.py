"""The loss in blocks equals its readable definition, and nothing in it is as large as (B, C)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from agff import fused_loss as module
from agff.batch import Batch
from agff.fused_loss import LARGEST_EXPONENT, fused_loss
from agff.losses import ega_loss, ega_weights
from agff.negatives import hardest_negative_mask
from agff.objectives.contrastive import Contrastive
from agff.row_loss import RowMeasures
from agff.similarity import FusionConfig, fused_similarity

TAU, WIDTH = 0.07, 0.1
NUM_FINE = (0, 1, 4)
BETAS = (0.01, 0.05, 0.2)
POSITIVE = torch.tensor([2, 0, 6, 3, 5])
WEIGHT = torch.tensor([0.3, -0.2, 1.0, 0.5, 0.1], dtype=torch.float64)
"""Of both signs, so that no gradient is right by luck."""
MASK = torch.rand(5, 7, generator=torch.Generator().manual_seed(5)) > 0.3
MASK[1] = False  # a row whose every negative is masked
EVERYTHING = torch.ones(5, 7, dtype=torch.bool)
INCOMING = -1.7


def vectors(rows: int, candidates: int, num_fine: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit vectors in float64; the candidates are close enough to the rows for hard negatives."""
    generator = torch.Generator().manual_seed(0)
    shape = (1 + num_fine, dim)
    query = torch.randn(rows, *shape, dtype=torch.float64, generator=generator)
    target = torch.randn(candidates, *shape, dtype=torch.float64, generator=generator) + 0.5 * query[:1]
    return normalize(query, dim=-1), normalize(target, dim=-1)


Result = tuple[Tensor, RowMeasures, Tensor, Tensor]
"""Loss, measures of the rows, gradients of queries and candidates."""


def in_blocks(query: Tensor, target: Tensor, mask: Tensor, **settings: Any) -> Result:
    query, target = query.clone().requires_grad_(), target.clone().requires_grad_()
    loss, rows = fused_loss(
        query,
        target,
        POSITIVE,
        WEIGHT,
        negatives_of=lambda block: mask[block],
        temperature=TAU,
        width=WIDTH,
        **settings,
    )
    return loss, rows, *torch.autograd.grad(INCOMING * loss, (query, target))


def by_definition(
    query: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    beta: float,
    margin: float | None = None,
    num_hardest: int | None = None,
    **settings: Any,
) -> Result:
    query, target = query.clone().requires_grad_(), target.clone().requires_grad_()
    similarity = fused_similarity(query, target, beta=beta)
    candidate = mask.scatter(1, POSITIVE[:, None], False)
    acting = hardest_negative_mask(
        similarity, POSITIVE, margin=margin, num_hardest=num_hardest, negative_mask_BC=mask
    )
    loss_B = ega_loss(similarity, POSITIVE, temperature=TAU, width=WIDTH, negative_mask_BC=acting, **settings)
    loss = (WEIGHT * loss_B).sum()
    ega = ega_weights(similarity, POSITIVE, amplification=settings["amplification"], width=WIDTH)
    rows = RowMeasures(
        loss_B=loss_B,
        positive_B=similarity.gather(1, POSITIVE[:, None])[:, 0],
        hardest_B=similarity.masked_fill(~candidate, -1.0).amax(dim=1),
        num_candidates_B=candidate.sum(dim=1).double(),
        num_negatives_B=acting.sum(dim=1).double(),
        weight_sum_B=(ega * acting).sum(dim=1),
    )
    return loss, rows, *torch.autograd.grad(INCOMING * loss, (query, target))


@contextmanager
def rows_at_once(count: int, num_candidates: int, num_vectors: int) -> Iterator[None]:
    """So small a buffer that a block has this many rows."""
    with pytest.MonkeyPatch.context() as patch:
        elements = count * num_candidates * (num_vectors**2 + module.STATISTICS)
        patch.setattr(module, "BLOCK_ELEMENTS", elements)
        yield


@pytest.mark.parametrize("num_fine", NUM_FINE)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("masked", [True, False])
def test_loss_measures_and_gradients_equal_the_definition(num_fine: int, beta: float, masked: bool) -> None:
    query, target = vectors(5, 7, num_fine, 6)
    mask = MASK if masked else EVERYTHING
    for amplification, renormalize, block_rows in product([0.0, 2.0], [True, False], [1, 2, 5]):
        settings = {"beta": beta, "amplification": amplification, "renormalize": renormalize}
        expected = by_definition(query, target, mask, **settings)
        with rows_at_once(block_rows, 7, 1 + num_fine):
            found = in_blocks(query, target, mask, **settings)
        # float64, sums of at most 175 terms of at most 1 / TAU: 1e-14 was seen
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("num_fine", [0, 4])
@pytest.mark.parametrize("num_hardest", [None, 1, 3, 6])
@pytest.mark.parametrize("margin", [None, -0.05, 0.0, 0.1])
def test_treatments_of_negatives_equal_the_definition(
    margin: float | None, num_hardest: int | None, num_fine: int
) -> None:
    query, target = vectors(5, 7, num_fine, 6)
    counts = set()
    for weight, amplification, renormalize, block_rows in product(
        [0.0, 9.0], [0.0, 2.0], [True, False], [2, 5]
    ):
        settings = {
            "beta": 0.05,
            "amplification": amplification,
            "renormalize": renormalize,
            "margin": margin,
            "num_hardest": num_hardest,
            "hardness_weight": weight,
        }
        expected = by_definition(query, target, MASK, **settings)
        with rows_at_once(block_rows, 7, 1 + num_fine):
            found = in_blocks(query, target, MASK, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        counts |= set((found[1].num_candidates_B - found[1].num_negatives_B).tolist())
    assert (counts != {0}) == ((margin, num_hardest) not in ((None, None), (None, 6)))


@pytest.mark.parametrize("weight", [0.0, 9.0])
def test_a_row_whose_every_negative_is_filtered_out_has_no_loss_and_no_gradient(weight: float) -> None:
    query, target = vectors(5, 7, 4, 6)
    _, rows, grad_query, _ = in_blocks(
        query,
        target,
        EVERYTHING,
        beta=0.05,
        amplification=2.0,
        renormalize=True,
        margin=0.1,
        num_hardest=4,
        hardness_weight=weight,
    )
    none = rows.num_negatives_B == 0
    assert 0 < none.sum() < 5
    assert (rows.loss_B[none] == 0).all()
    assert (grad_query[none] == 0).all()
    assert (rows.loss_B[~none] > 0).all()
    assert (rows.num_candidates_B == 6).all()
    assert (rows.hardest_B > -1).all(), "what the model confuses, filtered or not"


def test_the_betas_take_both_paths() -> None:
    assert {1 / beta > LARGEST_EXPONENT for beta in BETAS} == {True, False}


def test_a_row_whose_every_negative_is_masked_has_no_loss_and_no_gradient() -> None:
    query, target = vectors(5, 7, 4, 6)
    for amplification in (0.0, 2.0):
        _, rows, grad_query, _ = in_blocks(
            query, target, MASK, beta=0.05, amplification=amplification, renormalize=True
        )
        assert rows.loss_B[1] == 0
        assert rows.hardest_B[1] == -1
        assert (grad_query[1] == 0).all()
        assert (grad_query[0] != 0).all()


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("num_fine", NUM_FINE)
@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(num_fine: int, beta: float, filtered: bool) -> None:
    """Of plain InfoNCE: the gradients of EGA and of weights on logits are not those of their values."""

    def loss(query: Tensor, target: Tensor) -> Tensor:
        return fused_loss(
            query,
            target,
            POSITIVE,
            WEIGHT,
            negatives_of=lambda block: MASK[block],
            beta=beta,
            temperature=0.5,
            amplification=0,
            width=WIDTH,
            renormalize=True,
            margin=0.1 if filtered else None,
            num_hardest=2 if filtered else None,
        )[0]

    query, target = (side.requires_grad_() for side in vectors(5, 7, num_fine, 3))
    # checkpoint: gradcheck goes back more than once, and the loss gives its gradients away the first time
    assert torch.autograd.gradcheck(lambda q, t: checkpoint(loss, q, t, use_reentrant=False), (query, target))


def test_it_goes_back_once_and_is_differentiable_once() -> None:
    query, target = vectors(5, 7, 4, 6)

    def loss() -> Tensor:
        return in_blocks_loss(query.requires_grad_(), target)

    once = loss()
    once.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        once.backward()
    incoming = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(), query, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def in_blocks_loss(query: Tensor, target: Tensor, **settings: Any) -> Tensor:
    settings = {"beta": 0.05, "amplification": 2.0, "renormalize": True} | settings
    return fused_loss(
        query,
        target,
        POSITIVE,
        WEIGHT,
        negatives_of=lambda block: MASK[block],
        temperature=TAU,
        width=WIDTH,
        **settings,
    )[0]


@pytest.mark.parametrize("beta", [*BETAS, 1 / LARGEST_EXPONENT])
def test_float32_is_within_its_rounding_of_float64(beta: float) -> None:
    """At the temperature of the recipes and with identical items, where exponents are largest."""
    generator = torch.Generator().manual_seed(1)
    query, target = (normalize(torch.randn(n, 5, 64, generator=generator), dim=-1) for n in (16, 64))
    target[:4] = target[:4, :1]  # all vectors of an item alike
    query[:4] = target[:4]
    results = []
    for dtype in (torch.float64, torch.float32):
        sides = [side.to(dtype).requires_grad_() for side in (query, target)]
        loss, rows = fused_loss(
            *sides,
            torch.arange(16),
            torch.full((16,), 1 / 16, dtype=torch.float64),
            negatives_of=lambda block: torch.ones(16, 64, dtype=torch.bool)[block],
            beta=beta,
            temperature=0.02,
            amplification=1.0,
            width=WIDTH,
            renormalize=True,
        )
        results.append((loss, *rows, *torch.autograd.grad(loss, sides)))
    for exact, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        # an error of 1e-7 in a similarity is 5e-6 in a logit at temperature 0.02; gradients are about 1
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_in_and_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, target = (side.to(dtype) for side in vectors(5, 7, 4, 6))
    settings = {"beta": 0.05, "amplification": 2.0, "renormalize": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the inside
        loss, rows, grad_query, grad_target = in_blocks(query, target, MASK, **settings)
    expected = in_blocks(query.float(), target.float(), MASK, **settings)
    assert torch.equal(loss, expected[0])
    assert rows.loss_B.dtype == torch.float32
    assert torch.equal(grad_query, expected[2].to(dtype))
    assert torch.equal(grad_target, expected[3].to(dtype))


def test_what_does_not_need_a_gradient_gets_none() -> None:
    query, target = vectors(5, 7, 4, 6)
    in_blocks_loss(query.requires_grad_(), target).backward()
    assert query.grad is not None
    assert target.grad is None


class Watch(TorchDispatchMode):
    """The most numbers that a result of an operation had, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
        self.names.add(func.overloadpacket.__name__)
        return results


def objective_step(num_pairs: int, num_fine: int, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Pair losses of `Contrastive` and gradients of both sides; some pairs share their target."""
    query, target = vectors(num_pairs, num_pairs, num_fine, 4)
    ids = torch.arange(num_pairs)
    batch = Batch(
        chunks=(),
        row_of_item_R=torch.arange(2 * num_pairs),
        query_ids_B=ids,
        target_ids_B=ids // 2,
        negative_ids_N=torch.tensor([], dtype=torch.int64),
        addresses=("",) * num_pairs,
        filler={},
    )
    sides = [query.requires_grad_(), target.requires_grad_()]
    encoded = [{"embedding": side} for side in (*sides, query[:0].detach())]
    query_side, target_side, negative_side = encoded
    result = Contrastive(**settings)(query_side, target_side, negative_side, batch, FusionConfig())
    return result.pair_loss_B, *torch.autograd.grad(result.loss, sides)


TREATED = {"false_negative_margin": 0.1, "num_hardest": 3, "hardness_weight": 9.0}


@pytest.mark.parametrize("treated", [{}, TREATED], ids=["plain", "treated"])
@pytest.mark.parametrize("num_fine", NUM_FINE)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_nothing_in_an_objectives_step_is_as_large_as_rows_times_candidates(
    num_fine: int, bidirectional: bool, treated: dict[str, Any]
) -> None:
    num_pairs = 96  # more than the (1 + 4) * 4 numbers of an item: (B, C) is larger than all vectors
    num_vectors = 1 + num_fine
    with rows_at_once(1, num_pairs, num_vectors), Watch() as watch:
        objective_step(num_pairs, num_fine, bidirectional=bidirectional, **treated)
    one_row = num_pairs * (num_vectors**2 + module.STATISTICS)
    assert (
        one_row
        <= watch.largest
        <= max(one_row, num_pairs * num_vectors * 4, num_pairs * len(RowMeasures._fields))
    )
    assert watch.largest < num_pairs**2


@pytest.mark.parametrize("treated", [{}, TREATED], ids=["plain", "treated"])
def test_no_operation_waits_for_the_device(treated: dict[str, Any]) -> None:
    """On a GPU reading a number, or a result whose size depends on numbers, stops the host."""
    with Watch() as watch:
        objective_step(8, 4, **treated)
    assert "addmm_" in watch.names
    assert not watch.names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


@pytest.mark.parametrize("treated", [{}, TREATED], ids=["plain", "treated"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_objective_equals_its_definition_in_both_directions(
    bidirectional: bool, treated: dict[str, Any]
) -> None:
    query, target = (side.requires_grad_() for side in vectors(6, 6, 4, 4))
    ids = torch.arange(6)
    mask = (ids[:, None] // 2) != (ids[None, :] // 2)

    def direction(rows: Tensor, candidates: Tensor) -> Tensor:
        similarity = fused_similarity(rows, candidates, beta=0.05)
        acting = hardest_negative_mask(
            similarity,
            ids,
            margin=treated.get("false_negative_margin"),
            num_hardest=treated.get("num_hardest"),
            negative_mask_BC=mask,
        )
        return ega_loss(
            similarity,
            ids,
            temperature=TAU,
            amplification=1.0,
            negative_mask_BC=acting,
            hardness_weight=treated.get("hardness_weight", 0.0),
        )

    loss_B = direction(query, target)
    if bidirectional:
        loss_B = (loss_B + direction(target, query)) / 2
    expected = (loss_B.detach(), *torch.autograd.grad(loss_B.mean(), (query, target)))
    found = objective_step(6, 4, temperature=TAU, bidirectional=bidirectional, **treated)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["beta", "temperature", "width"])
def test_wrong_arguments_are_named(name: str) -> None:
    query, target = vectors(5, 7, 4, 6)
    good = {"beta": 0.05, "temperature": TAU, "width": WIDTH, "amplification": 1.0, "renormalize": True}

    def call(query: Tensor, **wrong: Any) -> None:
        fused_loss(query, target, POSITIVE, WEIGHT, negatives_of=lambda rows: MASK[rows], **good | wrong)

    with pytest.raises(ValueError, match=f"{name}=0 must be > 0"):
        call(query, **{name: 0})
    for other in ("amplification", "hardness_weight"):
        with pytest.raises(ValueError, match=f"{other}=-1 must be >= 0"):
            call(query, **{other: -1})
    with pytest.raises(ValueError, match="num_hardest=0 must be >= 1"):
        call(query, num_hardest=0)
    with pytest.raises(ValueError, match=r"\(B, M, D\).*\(5, 2, 6\) and \(7, 5, 6\)"):
        call(query[:, :2])


def test_rows_without_a_surviving_negative_are_counted() -> None:
    query, target = vectors(6, 6, 0, 4)
    ids = torch.arange(6)
    batch = Batch(
        chunks=(),
        row_of_item_R=torch.arange(12),
        query_ids_B=ids,
        target_ids_B=ids,
        negative_ids_N=torch.tensor([], dtype=torch.int64),
        addresses=("",) * 6,
        filler={},
    )
    sides: list[Any] = [{"embedding": side} for side in (query, target, query[:0])]
    similarity = query[:, 0] @ target[:, 0].T
    survivors = (similarity <= similarity.diagonal()[:, None]).sum(dim=1) - 1
    metrics = Contrastive(false_negative_margin=0.0)(*sides, batch, FusionConfig()).metrics
    assert 0 < metrics["rows_without_negative"] == (survivors == 0).sum() < 6
    assert metrics["negatives_per_row"] == survivors.double().mean()
    plain = Contrastive()(*sides, batch, FusionConfig()).metrics
    assert plain["rows_without_negative"] == 0
    for name in ("batch_accuracy", "similarity/hardest_negative"):
        assert metrics[name] == plain[name], "what the model confuses, filtered or not"
