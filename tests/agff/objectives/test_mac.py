from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig

import agff
from agff.batch import ModelInputs
from agff.errors import ConfigError
from agff.grad_cache import sides_as_leaves
from agff.objectives.mac import Mac, TokenMean
from agff.similarity import FusionConfig
from tests.agff.objectives import mac_case
from tests.agff.test_step import PlainEngine, slow_losses
from tests.agff.tiny import IMAGE_TOKEN, batch_of, chunk, global_rows, tiny_folder, tiny_model
from tests.ranks import run_ranks

TAU, D = 0.3, 5
WEIGHTS = {"coarse_to_fine": 0.7, "fine": 1.4}
LENGTHS = {"query": [1, 4, 2, 7], "target": [3, 1, 6, 2]}
"""Tokens of each item: no two of a pair have equally many."""


def items(side: str) -> tuple[Tensor, list[Tensor]]:
    """(unit embeddings, unit tokens of each item)."""
    generator = torch.Generator().manual_seed(len(side))

    def unit(count: int) -> Tensor:
        return normalize(torch.randn(count, D, dtype=torch.float64, generator=generator), dim=-1)

    return unit(len(LENGTHS[side])), [unit(length) for length in LENGTHS[side]]


def naive(query: tuple, target: tuple, i: int) -> float:
    """The loss of row i, with every (query i, target j, token of i, token of j) on its own."""
    (query_embedding, query_tokens), (target_embedding, target_tokens) = query, target

    def cross_entropy(cosines: list[float]) -> float:
        total = sum(math.exp(cosine / TAU) for cosine in cosines)
        return -math.log(math.exp(cosines[i] / TAU) / total)

    def mean_cosine(ones: list[Tensor], others: list[Tensor]) -> float:
        total = 0.0
        for one in ones:
            for other in others:
                total += sum(float(a) * float(b) for a, b in zip(one, other, strict=True))
        return total / (len(ones) * len(others))

    everyone = range(len(target_tokens))
    q, q_tokens = [query_embedding[i]], list(query_tokens[i])
    coarse = cross_entropy([mean_cosine(q, [target_embedding[j]]) for j in everyone])
    to_fine = cross_entropy([mean_cosine(q, list(target_tokens[j])) for j in everyone])
    from_fine = cross_entropy([mean_cosine(q_tokens, [target_embedding[j]]) for j in everyone])
    fine = cross_entropy([mean_cosine(q_tokens, list(target_tokens[j])) for j in everyone])
    return coarse + WEIGHTS["coarse_to_fine"] / 2 * (to_fine + from_fine) + WEIGHTS["fine"] * fine


def sides() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = []
    for side in ("query", "target"):
        embedding, tokens = items(side)
        found += [embedding, torch.stack([each.mean(dim=0) for each in tokens])]
    return tuple(found)


@pytest.mark.parametrize("both_directions", [False, True])
def test_mac_equals_the_loop_over_all_pairs_of_tokens_of_unequal_numbers(both_directions: bool) -> None:
    query, target = items("query"), items("target")
    expected = [naive(query, target, i) for i in range(4)]
    if both_directions:
        expected = [(one + naive(target, query, i)) / 2 for i, one in enumerate(expected)]
    found = agff.mac_loss(*sides(), temperature=TAU, **WEIGHTS, both_directions=both_directions)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_gradcheck() -> None:
    def loss(*tensors: Tensor) -> Tensor:
        return agff.mac_loss(*tensors, temperature=TAU, **WEIGHTS, both_directions=True)

    assert torch.autograd.gradcheck(loss, [side.requires_grad_() for side in sides()])


def test_without_its_further_terms_it_is_info_nce() -> None:
    query_BD, _, target_BD, _ = inputs = sides()
    found = agff.mac_loss(*inputs, temperature=TAU, coarse_to_fine=0, fine=0)
    expected = agff.info_nce(query_BD @ target_BD.T, torch.arange(4), temperature=TAU)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def share(world_size: int, rank: int) -> tuple[Tensor, list[Tensor]]:
    """(loss of the rank's rows, gradients of its sides) of the mean over the global batch."""
    local = 4 // world_size
    own = [side[rank * local : (rank + 1) * local].clone().requires_grad_() for side in sides()]
    loss_B = agff.mac_loss(*own, temperature=TAU, **WEIGHTS, both_directions=True)
    gradients = torch.autograd.grad(loss_B.mean() / world_size, own)
    return loss_B.detach(), list(gradients)


def share_of_this_rank() -> tuple[Tensor, list[Tensor]]:
    return share(dist.get_world_size(), dist.get_rank())


def test_two_ranks_equal_one_process() -> None:
    expected_loss, expected = share(1, 0)
    results = run_ranks(share_of_this_rank, world_size=2)
    torch.testing.assert_close(torch.cat([loss for loss, _ in results]), expected_loss, rtol=0, atol=1e-12)
    for index, gradient in enumerate(expected):
        found = torch.cat([gradients[index] for _, gradients in results])
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def test_wrong_calls_are_named() -> None:
    query, query_tokens, *target = sides()
    with pytest.raises(ValueError, match=r"one shape \(B, D\), got \[\(4, 5\), \(3, 5\)"):
        agff.mac_loss(query, query_tokens[:3], *target, temperature=TAU)
    with pytest.raises(ValueError, match="temperature=0 must be > 0"):
        agff.mac_loss(query, query_tokens, *target, temperature=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "loss.temperature=0.0 must be > 0"),
        ({"coarse_to_fine": -1.0}, "loss.coarse_to_fine=-1.0 must be >= 0"),
        ({"fine": -0.5}, "loss.fine=-0.5 must be >= 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mac(**settings)


# ---------------------------------------------------------------- the tokens of an item

TEXTS = [[3, 4, 5], [7], [8, 9]]
IMAGES = [None, torch.ones(4, 96), None]


def content_by_hand(states_TH: Tensor, inputs: ModelInputs, row: int) -> Tensor:
    places = range(int(inputs["prompt_start_B"][row]))
    images = [place for place in places if int(inputs["input_ids"][row, place]) == IMAGE_TOKEN]
    units = [states_TH[place] / states_TH[place].norm() for place in images or places]
    return sum(units, torch.zeros_like(states_TH[0])) / max(1, len(units))


@pytest.mark.parametrize("images", [IMAGES, [None] * 3], ids=["an image", "a blank one behind the prompts"])
def test_tokens_are_those_of_the_image_else_of_the_text(images: list[Tensor | None]) -> None:
    inputs = chunk(TEXTS, images, 2)
    assert (inputs["input_ids"] == IMAGE_TOKEN).any()
    states_BTH = torch.randn(*inputs["input_ids"].shape, 6, dtype=torch.float64)
    behind = inputs["prompt_start_B"][:, None] <= torch.arange(states_BTH.shape[1])
    states_BTH[behind] = math.nan  # prompts, padding and the blank image must not matter
    found = TokenMean(IMAGE_TOKEN)([states_BTH], inputs, torch.empty(0))["tokens"]
    expected = torch.stack([content_by_hand(states_BTH[row], inputs, row) for row in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert (found.norm(dim=1) <= 1 + 1e-12).all()


def test_one_tensor_of_all_states_waits_for_the_backward_pass() -> None:
    """In float32: of 32 images of 600 tokens of Qwen2-VL-2B each is 118 MB."""
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.int64), "prompt_start_B": torch.tensor([5, 6])}
    states_BTH = torch.randn(2, 7, 16, dtype=torch.bfloat16, requires_grad=True)
    kept = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == states_BTH.numel():
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens_BD = TokenMean(IMAGE_TOKEN)((states_BTH,), inputs, torch.zeros(2, 1, 16))["tokens"]
    assert len(kept) == 1
    assert tokens_BD.dtype == torch.float32


def test_an_item_without_content_has_zeros() -> None:
    inputs = chunk([[]], [None], 2)
    found = TokenMean(IMAGE_TOKEN)([torch.randn(1, 4, 6)], inputs, torch.empty(0))["tokens"]
    assert (found == 0).all()


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("num_fine", [0, 2])
def test_the_objective_has_targets_and_explicit_negatives_as_candidates_but_equal_content(
    num_fine: int,
) -> None:
    """By definition, row by row, on what the model loaded from a folder makes of the items."""
    rows = global_rows(6, num_fine, rows_without_image=range(4, 6))
    objective = Mac(temperature=TAU, **WEIGHTS)
    model = PlainEngine(tiny_model(num_fine, head=TokenMean(IMAGE_TOKEN)))
    batch = mac_case.prepared(batch_of(rows, 18, num_fine))
    query, target, negative = sides_as_leaves(batch, [model.encode(part) for part in batch.chunks])
    result = objective(query, target, negative, batch, FusionConfig(beta=0.1))
    place = {j: k for k, j in enumerate(j for j, row in enumerate(rows) if "negative" in row)}

    def losses(one: str, other: str) -> Tensor:
        def vectors(side: dict[str, Tensor], kind: str) -> Tensor:
            return {
                "tokens": side["tokens"][:, None],
                "global": side["embedding"][:, :1],
                "all": side["embedding"],
            }[kind]

        def similarity(i: int, side: str, j: int) -> float:
            found = target if side == "target" else negative
            k = j if side == "target" else place[j]
            pair = vectors(query, one)[i : i + 1], vectors(found, other)[k : k + 1]
            return agff.fused_similarity(*pair, beta=0.1).item()

        return torch.tensor(slow_losses(similarity, rows, temperature=TAU), dtype=torch.float64)

    expected = losses("all", "all")
    expected += WEIGHTS["coarse_to_fine"] / 2 * (losses("global", "tokens") + losses("tokens", "global"))
    expected += WEIGHTS["fine"] * losses("tokens", "tokens")
    torch.testing.assert_close(result.pair_loss_B, expected, rtol=0, atol=1e-11)
    assert result.loss.item() == pytest.approx(expected.mean().item(), abs=1e-11)
    assert batch.num_negatives == 3


def test_the_objective_without_negatives_is_the_public_function() -> None:
    rows = [
        {**{k: v for k, v in row.items() if not k.startswith("negative")}, "target_id": 100 + index}
        for index, row in enumerate(global_rows(5, 0, rows_without_image=range(3, 5)))
    ]
    engine, batch = PlainEngine(tiny_model(0, head=TokenMean(IMAGE_TOKEN))), batch_of(rows, 10, 0)
    sides = sides_as_leaves(batch, [engine.encode(part) for part in batch.chunks])
    (query, target, negative), leaves = sides, [tensor for side in sides[:2] for tensor in side.values()]
    for both in (False, True):
        result = Mac(temperature=TAU, both_directions=both)(query, target, negative, batch, FusionConfig())
        expected = agff.mac_loss(
            query["embedding"][:, 0],
            query["tokens"],
            target["embedding"][:, 0],
            target["tokens"],
            temperature=TAU,
            both_directions=both,
        )
        torch.testing.assert_close(result.pair_loss_B, expected, rtol=0, atol=1e-12)
        found = torch.autograd.grad(result.loss, leaves, retain_graph=True)
        gradients = torch.autograd.grad(expected.mean(), leaves, retain_graph=True)
        torch.testing.assert_close(found, gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("both_directions", [False, True])
def test_truncations_are_of_the_embeddings_in_the_first_term_alone(both_directions: bool) -> None:
    """The mean, by weight, of first terms of truncated embeddings, and the terms with tokens once."""
    num_fine, rows = 2, global_rows(6, 2, rows_without_image=range(4, 6))
    engine, batch = (
        PlainEngine(tiny_model(num_fine, head=TokenMean(IMAGE_TOKEN))),
        batch_of(rows, 15, num_fine),
    )
    sides = sides_as_leaves(batch, [engine.encode(part) for part in batch.chunks])
    fusion, width = FusionConfig(beta=0.1), sides[0]["embedding"].shape[-1]
    settings = {"temperature": TAU, "both_directions": both_directions}

    def first_term(dim: int, count: int) -> Tensor:
        cut = [{**side, "embedding": side["embedding"][:, : 1 + count, :dim]} for side in sides]
        if dim < width:  # whole vectors come as unit vectors, with the gradient of that
            for side in cut:
                side["embedding"] = side["embedding"] / side["embedding"].norm(dim=-1, keepdim=True)
        cut = [{**side, "tokens": side["tokens"][:, :dim]} for side in cut]  # weigh 0 here
        return Mac(**settings, coarse_to_fine=0, fine=0)(*cut, batch, fusion).pair_loss_B

    whole = Mac(**settings, **WEIGHTS)(*sides, batch, fusion)
    weights = {(width, 2): 1.0, (width, 0): 3.0, (8, 2): 0.5, (8, 0): 1.5, (3, 2): 2.0, (3, 0): 6.0}
    firsts = sum(weight * first_term(*size) for size, weight in weights.items()) / sum(weights.values())
    expected_B = firsts + whole.pair_loss_B - first_term(width, 2)
    nested = Mac(**settings, **WEIGHTS, nested_dims=[3, 8], nested_fine=[0], nested_weights=[2.0, 0.5, 3.0])
    result = nested(*sides, batch, fusion)
    torch.testing.assert_close(result.pair_loss_B, expected_B.detach(), rtol=0, atol=1e-12)
    assert result.loss.item() == pytest.approx(expected_B.mean().item(), abs=1e-12)
    assert result.metrics == whole.metrics, "of whole items"
    assert result.loss.item() != pytest.approx(whole.loss.item(), abs=1e-3)


def test_truncations_that_do_not_fit_are_named() -> None:
    config = AutoConfig.from_pretrained(tiny_folder().name)
    with pytest.raises(ConfigError, match=r"loss.nested_dims=\[8, 17\] must be <= 16"):
        Mac(nested_dims=[8, 17]).check_backbone(config)
    with pytest.raises(ConfigError, match=r"loss.nested_fine=\[3\] must be <= prompts.num_fine=2"):
        Mac(nested_fine=[3]).check_sizes(global_batch_size=64, num_fine=2)
    with pytest.raises(ConfigError, match=r"loss.nested_dims=\[4, 2\] must increase"):
        Mac(nested_dims=[4, 2])
