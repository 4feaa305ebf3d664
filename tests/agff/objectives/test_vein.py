from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from agff.backbone import BackboneConfig, choose_trainable, load_backbone
from agff.batch import Batch, Encoded, Item, ModelInputs
from agff.embedding_model import EmbeddingModel, draws_random_numbers
from agff.errors import ConfigError
from agff.objectives.contrastive import Contrastive
from agff.objectives.objective import Head, Objective
from agff.objectives.vein import MaskedReconstruction, Vein, VisualSources, is_purely_visual, sinusoids
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
from agff.step import train_step
from tests.agff.objectives import vein_case
from tests.agff.objectives.vein_case import FixedMasks
from tests.agff.test_step import PlainEngine
from tests.agff.tiny import batch_of, chunk, global_rows, tiny_folder, tiny_model
from tests.ranks import run_ranks

HIDDEN, HEADS, VOCABULARY, IMAGE, TEXT = 16, 8, 50, 40, 5
NUM_VECTORS, TOKENS_PER_PROMPT, LAYERS = 2, 3, 2
PROMPTS = [VOCABULARY + index for index in range(NUM_VECTORS * TOKENS_PER_PROMPT)]

# ---------------------------------------------------------------- the head equals a loop over items

ROWS = [
    [TEXT, *[IMAGE] * 9, TEXT, *PROMPTS],
    [TEXT, TEXT, *PROMPTS, IMAGE],  # a blank image behind the prompts
    [IMAGE, *PROMPTS],
    [*[IMAGE] * 4, TEXT, *PROMPTS],
    [*[IMAGE] * 3, TEXT, TEXT, *PROMPTS],
]
NUM_TOKENS = [9, 0, 1, 4, 3]


def inputs_of(rows: Sequence[list[int]], *, width: int = 0) -> ModelInputs:
    input_ids = torch.zeros(len(rows), max(width, *map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
    starts = [row.index(VOCABULARY) for row in rows]
    return {"input_ids": input_ids, "prompt_start_B": torch.tensor(starts)}


def head_of(
    kind: type[MaskedReconstruction] = FixedMasks, *, ratio: float = 0.5, dropout: float = 0.0
) -> Any:
    torch.manual_seed(0)
    head = kind(
        hidden_size=HIDDEN,
        vocabulary_size=VOCABULARY,
        image_token_id=IMAGE,
        num_states=LAYERS,
        mask_ratio=ratio,
        dropout=dropout,
    ).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def states_of(inputs: ModelInputs) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (*inputs["input_ids"].shape, HIDDEN)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(LAYERS)]


def embedding_of(inputs: ModelInputs) -> Tensor:
    return torch.empty(len(inputs["input_ids"]), NUM_VECTORS, HIDDEN)


def attend(attention: nn.MultiheadAttention, query: Tensor, others: Tensor) -> Tensor:
    """(S, H) by the definition of multi-head attention, one head after the other."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, others, others), weights, biases, strict=True))
    width = HIDDEN // HEADS
    parts = []
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        share = (q[:, own] @ k[:, own].T / math.sqrt(width)).softmax(dim=1)
        parts.append(share @ v[:, own])
    return torch.cat(parts, dim=1) @ attention.out_proj.weight.T + attention.out_proj.bias


def decode(decoder: Any, inputs: Tensor, memory: Tensor) -> Tensor:
    """A decoder layer with its norms behind each part."""
    inputs = decoder.norm1(inputs + attend(decoder.self_attn, inputs, inputs))
    inputs = decoder.norm2(inputs + attend(decoder.multihead_attn, inputs, memory))
    return decoder.norm3(inputs + decoder.linear2(decoder.linear1(inputs).relu()))


def position(place: int) -> Tensor:
    values = []
    for pair in range(HIDDEN // 2):
        angle = place / 10_000 ** (2 * pair / HIDDEN)
        values += [math.sin(angle), math.cos(angle)]
    return torch.tensor(values, dtype=torch.float64)


def by_hand(head: Any, state_TH: Tensor, row: list[int]) -> tuple[Tensor, int]:
    """(sum of 1 - cosine, masked tokens) of one item at one layer."""
    start = row.index(VOCABULARY)
    places = [place for place in range(start) if row[place] == IMAGE]
    if not places:
        return torch.zeros((), dtype=torch.float64), 0
    scores = head.draw(torch.tensor([[token == IMAGE for token in row]]))[0]
    num_masked = max(1, math.floor(head.mask_ratio * len(places)))
    drawn = sorted(range(len(places)), key=lambda index: float(scores[places[index]]))[:num_masked]
    visual = [state_TH[place].detach() + position(index) for index, place in enumerate(places)]
    kept = [vector for index, vector in enumerate(visual) if index not in drawn]
    item = state_TH[start + TOKENS_PER_PROMPT - 1]
    queries = torch.stack([item, *(head.mask_token + position(index) for index in drawn)])
    memory = torch.stack(kept) if kept else torch.zeros(1, HIDDEN, dtype=torch.float64)
    found = decode(head.decoder, queries, memory)[1:]
    cosines = [torch.cosine_similarity(a, visual[b], dim=0) for a, b in zip(found, drawn, strict=True)]
    return torch.stack([1 - cosine for cosine in cosines]).sum(), num_masked


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_the_head_equals_a_loop_over_items_of_unequal_numbers_of_tokens(ratio: float) -> None:
    """Values, and gradients of every parameter and state, weighted by both signs."""
    head, inputs = head_of(ratio=ratio), inputs_of(ROWS, width=25)
    states = [state.requires_grad_() for state in states_of(inputs)]
    found = head(states, inputs, embedding_of(inputs))
    loops = [[by_hand(head, state[index], row) for state in states] for index, row in enumerate(ROWS)]
    expected_B = torch.stack([torch.stack([loss for loss, _ in layers]).sum() for layers in loops])
    expected_counts = [sum(count for _, count in layers) for layers in loops]
    assert expected_counts == [LAYERS * (max(1, int(ratio * n)) if n else 0) for n in NUM_TOKENS]
    assert found["num_masked"].tolist() == expected_counts
    torch.testing.assert_close(found["reconstruction"], expected_B, rtol=0, atol=1e-11)
    assert (found["reconstruction"] > 0).tolist() == [count > 0 for count in expected_counts]
    incoming_B = torch.tensor([1.0, 3.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    wanted = [*states, *head.parameters()]
    one, other = (
        torch.autograd.grad((incoming_B * loss_B).sum(), wanted, retain_graph=True)
        for loss_B in (found["reconstruction"], expected_B)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_no_gradient_reaches_the_visual_states_but_the_items_do_get_one() -> None:
    head, inputs = head_of(), inputs_of(ROWS)
    states = [state.requires_grad_() for state in states_of(inputs)]
    loss = head(states, inputs, embedding_of(inputs))["reconstruction"].sum()
    for gradient in torch.autograd.grad(loss, states):
        touched = {(row, place) for row, place, _ in gradient.nonzero().tolist()}
        last = [row.index(VOCABULARY) + TOKENS_PER_PROMPT - 1 for row in ROWS]
        assert touched == {(row, last[row]) for row, count in enumerate(NUM_TOKENS) if count}


def test_gradcheck() -> None:
    head, inputs = head_of(), inputs_of(ROWS[2:])

    def losses(*states: Tensor) -> Tensor:
        # where the head detaches, a difference quotient would still see the state: those are constants here
        mixed = [
            torch.where(is_item, state, fixed) for state, fixed in zip(states, fixed_states, strict=True)
        ]
        return head(mixed, inputs, embedding_of(inputs))["reconstruction"]

    fixed_states = states_of(inputs)
    item_B1 = (inputs["prompt_start_B"] + TOKENS_PER_PROMPT - 1)[:, None]
    is_item = (torch.arange(fixed_states[0].shape[1]) == item_B1)[..., None]
    assert torch.autograd.gradcheck(losses, [state.clone().requires_grad_() for state in fixed_states])


def test_sinusoids_are_those_of_the_definition() -> None:
    found = sinusoids(30, torch.empty(1, HIDDEN, dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack([position(p) for p in range(30)]), rtol=0, atol=1e-12)


def test_another_part_of_the_tokens_is_drawn_each_time() -> None:
    head, inputs = head_of(MaskedReconstruction), inputs_of(ROWS)
    states = states_of(inputs)
    first, second = (head(states, inputs, embedding_of(inputs)) for _ in range(2))
    assert first["reconstruction"][0] != second["reconstruction"][0]
    assert first["num_masked"].tolist() == second["num_masked"].tolist() == [8.0, 0.0, 2.0, 4.0, 2.0]
    assert draws_random_numbers(head.eval())


def test_a_chunk_without_an_image_takes_all_parameters_with_a_gradient_of_zero() -> None:
    head, inputs = head_of(MaskedReconstruction, dropout=0.1), inputs_of([ROWS[1], PROMPTS])
    found = head(states_of(inputs), inputs, embedding_of(inputs))
    assert (found["reconstruction"] == 0).all()
    assert (found["num_masked"] == 0).all()
    gradients = torch.autograd.grad(found["reconstruction"].sum(), list(head.parameters()))
    assert all((gradient == 0).all() for gradient in gradients)


# ---------------------------------------------------------------- the states of the last layers


class States(Head):
    """The last states at the first prompt and at the first token."""

    num_states = 3

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        rows_B = torch.arange(len(embedding_BMD))
        return {
            f"state{index}": torch.cat([state[rows_B, inputs["prompt_start_B"]], state[:, 0]], dim=1)
            for index, state in enumerate(states)
        }


def hooked(language_model: Any) -> tuple[list[Tensor], list[Any]]:
    """(the layers' inputs and the norm's output as they come, what ends that)."""
    calls: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
        for layer in language_model.layers
    ]
    hooks.append(language_model.norm.register_forward_hook(lambda _, __, output: calls.append(output)))
    return calls, hooks


def test_with_gradient_checkpointing_the_last_states_are_those_of_the_plain_model() -> None:
    """On a model loaded from a folder, in training mode: embeddings of the tokens, both layers, the last
    behind its norm; and gradients through them."""
    inputs = chunk([[3, 4], [5, 6, 7]], [torch.ones(4, 96), None], 1)
    found = {}
    for checkpointing in (True, False):
        backbone = load_backbone(Path(tiny_folder().name), dtype=torch.float64, attention="sdpa")
        chosen = choose_trainable(backbone, BackboneConfig(path="", gradient_checkpointing=checkpointing))
        assert chosen.language_model.layers[0].gradient_checkpointing == checkpointing
        assert chosen.training
        model = EmbeddingModel(chosen, PromptConfig(num_fine=1), States()).double()
        nn.init.constant_(model.prompted_embedding.vectors, 0.1)
        calls, hooks = hooked(chosen.language_model)
        encoded = model(inputs)
        rows_B = torch.arange(2)
        for index, state in enumerate(calls[:3]):
            expected = torch.cat([state[rows_B, inputs["prompt_start_B"]], state[:, 0]], dim=1)
            assert torch.equal(encoded[f"state{index}"], expected), f"{checkpointing} {index}"
        for hook in hooks:
            hook.remove()
        sum((-1) ** i * encoded[f"state{i}"].square().sum() for i in range(3)).backward()
        found[checkpointing] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[True].keys() == found[False].keys()
    assert {name for name in found[True] if "layers.1" in name}
    for name, gradient in found[True].items():
        torch.testing.assert_close(gradient, found[False][name], rtol=1e-10, atol=1e-12, msg=name)


# ---------------------------------------------------------------- the objective


def backbone_config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(tiny_folder().name)


def tiny_head(objective: Objective) -> Head | None:
    return objective.build_head(backbone_config())


def step(
    objective: Vein, chunking: int, *, copies: int = 1, all_eligible: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics and loss, gradients of the decoder) of one step on this rank's share of the global batch.

    copies: of the same items in the batch, each with content ids of its own."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rows = global_rows(8, 2, rows_without_image=range(4, 8))
    rows = [
        {**row, "query_id": row["query_id"] + 1000 * copy, "target_id": row["target_id"] + 1000 * copy}
        for row in rows
        for copy in range(copies)
    ]
    local = len(rows) // world_size
    batch = batch_of(rows[rank * local : (rank + 1) * local], chunking, 2)
    eligible_B = (batch.query_ids_B % 1000 < 4) & (all_eligible | (batch.query_ids_B % 1000 != 1))
    pair_data = {"query_is_visual": eligible_B.float(), "target_is_visual": torch.ones(local)}
    engine = PlainEngine(tiny_model(2, head=tiny_head(objective)))
    result = train_step(engine, objective, FusionConfig(), dataclasses.replace(batch, pair_data=pair_data))
    gradients = {n: p.grad for n, p in engine.model.named_parameters() if "head" in n and p.grad is not None}
    return {"loss": result.loss.item(), **{n: m.item() for n, m in result.metrics.items()}}, gradients


CASES = [(chunking, copies) for chunking in (1, 3, 100) for copies in (1, 2)]


def steps() -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    return [step(vein_case.OBJECTIVE, chunking, copies=copies) for chunking, copies in CASES]


def test_the_weight_of_the_reconstruction_depends_on_no_rank_no_chunk_and_no_number_of_items() -> None:
    """The gradient of the decoder, which the contrastive part does not touch, is the same; on two ranks all
    visual items are on one of them."""
    expected, gradients = step(vein_case.OBJECTIVE, 100)
    weight = vein_case.OBJECTIVE.reconstruction_weight
    assert expected["loss"] == pytest.approx(
        expected["vein/contrastive"] + weight * expected["vein/reconstruction"]
    )
    assert min(gradient.abs().max() for gradient in gradients.values()) > 1e-6
    for results in ([steps()], run_ranks(steps, world_size=2)):
        for index, (_, copies) in enumerate(CASES):
            found = {name: sum(rank[index][0][name] for rank in results) / len(results) for name in expected}
            names = ["vein/reconstruction"] + ["vein/contrastive", "loss"] * (copies == 1)
            for name in names:
                assert found[name] == pytest.approx(expected[name], abs=1e-12), f"{name} {CASES[index]}"
            assert found["vein/visual_items"] == pytest.approx(3 / 16)
            for name, gradient in results[0][index][1].items():
                torch.testing.assert_close(gradient, gradients[name], rtol=1e-9, atol=1e-12, msg=name)
    doubled, twice = step(dataclasses.replace(vein_case.OBJECTIVE, reconstruction_weight=2 * weight), 100)
    assert doubled["loss"] - expected["loss"] == pytest.approx(weight * expected["vein/reconstruction"])
    torch.testing.assert_close(twice, {n: 2 * g for n, g in gradients.items()}, rtol=1e-9, atol=1e-12)


def test_only_eligible_items_count_each_by_its_masked_tokens() -> None:
    objective = vein_case.OBJECTIVE
    sums = torch.tensor([1.0, 6.0, 4.0, 8.0], dtype=torch.float64)
    counts, visual = torch.tensor([2.0, 4.0, 0.0, 8.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    embedding = nn.functional.normalize(torch.randn(2, 1, 4, dtype=torch.float64), dim=-1)
    sides = [
        {"embedding": embedding[:number], "reconstruction": sums[own], "num_masked": counts[own]}
        for own, number in ((slice(0, 2), 2), (slice(2, 4), 2), (slice(0, 0), 0))
    ]
    batch = Batch(
        chunks=(),
        row_of_item_R=torch.arange(4),
        query_ids_B=torch.tensor([1, 2]),
        target_ids_B=torch.tensor([3, 4]),
        negative_ids_N=torch.tensor([], dtype=torch.int64),
        addresses=("a", "b"),
        filler={},
        pair_data={"query_is_visual": visual[:2], "target_is_visual": visual[2:]},
    )
    result = objective(*sides, batch, FusionConfig())
    assert result.metrics["vein/reconstruction"].item() == pytest.approx((1 + 8) / (2 + 8))
    nothing = dataclasses.replace(batch, pair_data={name: torch.zeros(2) for name in batch.pair_data})
    without = objective(*sides, nothing, FusionConfig())
    settings = {f.name: getattr(objective, f.name) for f in dataclasses.fields(Contrastive)}
    plain = Contrastive(**settings)(*sides, batch, FusionConfig())
    assert without.loss.item() == plain.loss.item()
    assert torch.equal(without.pair_loss_B, plain.pair_loss_B)
    assert plain.metrics.items() <= without.metrics.items()


def test_masks_and_dropout_are_the_same_in_both_passes() -> None:
    """The step in two passes has the gradient of one graph with the same draws."""
    objective = Vein(layers=2, decoder_dropout=0.3, temperature=0.5)
    rows = global_rows(4, 0, rows_without_image=range(0))
    batch = vein_case.prepared(batch_of(rows, 2, 0))

    def seeded() -> PlainEngine:
        torch.manual_seed(5)
        engine = PlainEngine(tiny_model(0, head=tiny_head(objective)))
        torch.manual_seed(6)
        return engine

    two_passes = seeded()
    result = train_step(two_passes, objective, FusionConfig(), batch)
    one_graph = seeded()
    others = [one_graph.encode(part) for part in batch.chunks[1:]]
    encoded = [one_graph.encode(batch.chunks[0]), *others]
    rows = {name: torch.cat([chunk[name] for chunk in encoded]) for name in encoded[0]}
    expected = objective(*batch.split(rows), batch, FusionConfig())
    expected.loss.backward()
    assert result.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    gradients = {name: p.grad for name, p in one_graph.model.named_parameters() if p.grad is not None}
    assert gradients["head.mask_token"].abs().max() > 0
    for name, parameter in two_passes.model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)


# ---------------------------------------------------------------- which items, which settings

PICTURE = Image.new("RGB", (4, 4))
TEXTS: dict[str, tuple[str, str, bool]] = {
    "an image alone": ("<|image_1|>\n", "", True),
    "MMEB's image target": ("<|image_1|>\nRepresent the given image.\n", "", True),
    "without a full stop": ("<|image_1|>\nRepresent the given image for classification\n", "", True),
    "an instruction that asks": ("<|image_1|>\nWhich group?\n", "", True),
    "a caption behind a colon": (
        "<|image_1|>\nRepresent the given news image with the following caption: A man.\n", "", False,
    ),
    "a second sentence": ("<|image_1|>\nRepresent the given image. A dog runs.\n", "", False),
    "a second line": ("<|image_1|>\nRepresent the given image\nA dog\n", "", False),
    "the instruction, kept apart": ("<|image_1|>\nFind it. Look: here.\n", "Find it. Look: here.", True),
    "text behind one kept apart": ("<|image_1|>\nFind it. A dog\n", "Find it.", False),
    "a word behind one kept apart": ("<|image_1|>\nFind a dog\n", "Find a", False),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_an_item_is_purely_visual_without_text_beyond_its_instruction(name: str) -> None:
    text, instruction, expected = TEXTS[name]
    assert is_purely_visual(Item(text=text, image=PICTURE, instruction=instruction)) == expected
    assert not is_purely_visual(Item(text=text.replace("<|image_1|>", ""), instruction=instruction))


def test_only_listed_sides_of_listed_sources_are_visual() -> None:
    objective = Vein(visual_sources=VisualSources(queries=["i2t"], targets=["t2i", "both"]))
    image, text = Item(text="<|image_1|>\n", image=PICTURE), Item(text="a dog")
    for source, query, target, expected in [
        ("i2t", image, image, (1.0, 0.0)),
        ("t2i", image, image, (0.0, 1.0)),
        ("both", image, text, (0.0, 0.0)),
        ("none", image, image, (0.0, 0.0)),
    ]:
        found = objective.pair_data_of(source, query, target)
        assert (found["query_is_visual"], found["target_is_visual"]) == expected, source


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            VisualSources(queries=["a", "x"], targets=["y"]),
            r"loss.visual_sources.queries: x; loss.visual_sources.targets: y; there are a, b",
        ),
        (VisualSources(), r"loss.visual_sources names no source.*queries: \[...\].*of a, b"),
    ],
)
def test_sources_that_do_not_exist_and_none_at_all_are_refused(sources: VisualSources, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Vein(visual_sources=sources).check(["b", "a"])
    Vein(visual_sources=VisualSources(targets=["b"])).check(["b", "a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reconstruction_weight": 0.0},
            "loss.reconstruction_weight=0.0 must be > 0.*objective: contrastive",
        ),
        ({"layers": 0}, "loss.layers=0 must be >= 1"),
        ({"mask_ratio": 1.0}, "loss.mask_ratio=1.0 must be > 0 and < 1"),
        ({"decoder_dropout": -0.1}, "loss.decoder_dropout=-0.1 must be >= 0 and < 1"),
        ({"temperature": 0.0}, "loss.temperature=0.0 must be > 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Vein(**settings)


def test_a_backbone_that_does_not_fit_is_refused() -> None:
    config = backbone_config()
    with pytest.raises(ConfigError, match=r"loss\.layers=3 must be <= the backbone's 2 layers"):
        Vein(layers=3).build_head(config)
    config.get_text_config().hidden_size = 20
    with pytest.raises(ConfigError, match="hidden size 20 is no multiple of the decoder's 8 heads"):
        Vein(layers=2).build_head(config)
