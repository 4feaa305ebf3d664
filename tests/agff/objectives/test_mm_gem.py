"""MM-GEM's loss against slow loops, and its generation loss against transformers' own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from agff.batch import IMAGE_PLACEHOLDER, NO_CONTENT, Batch, Encoded, Item
from agff.errors import ConfigError, DataError
from agff.objectives.mm_gem import MmGem
from agff.optimizer import build_adamw, build_schedule
from agff.similarity import FusionConfig
from agff.step import train_step
from data_pipeline.collate import TokenBudget
from tests.agff.objectives import mm_gem_case
from tests.agff.test_step import OPTIMIZER, PlainEngine, zero_config
from tests.agff.tiny import batch_of, global_rows, tiny_folder, tiny_model
from tests.ranks import run_ranks

NAMES = ("embedding", "caption_nll", "caption_tokens", "temperature")
TOKENS = ([3.0, 0.0, 5.0, 1.0], [0.0, 7.0, 0.0, 0.0], [0.0, 0.0])
"""Of the queries, targets, negatives; a row without a caption has none."""


def sides(temperature: float = 0.3, dim: int = 5) -> tuple[dict[str, Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for tokens in TOKENS:
        vectors = torch.randn(len(tokens), 1, dim, generator=generator, dtype=torch.float64)
        tokens_B = torch.tensor(tokens, dtype=torch.float64)
        found.append(
            {
                "embedding": torch.nn.functional.normalize(vectors, dim=-1),
                "caption_nll": tokens_B * torch.rand(len(tokens), generator=generator).double() * 4,
                "caption_tokens": tokens_B,
                "temperature": torch.full((len(tokens),), temperature, dtype=torch.float64),
            }
        )
    return tuple(found)


def a_batch() -> Batch:
    """Pairs 0 and 3 share a target; the first negative is the target of pair 1; one place is padding."""
    return Batch(
        chunks=(),
        row_of_item_R=torch.arange(10),
        query_ids_B=torch.tensor([0, 1, 2, 3]),
        target_ids_B=torch.tensor([100, 101, 102, 100]),
        negative_ids_N=torch.tensor([101, NO_CONTENT]),
        addresses=("",) * 4,
        filler={},
    )


def slow_loss(query: Encoded, target: Encoded, negative: Encoded, *, weights: tuple[float, float]) -> float:
    batch = a_batch()
    query_ids, target_ids = batch.query_ids_B.tolist(), batch.target_ids_B.tolist()

    def direction(rows: Tensor, others: Tensor, row_ids: list[int], other_ids: list[int]) -> list[float]:
        losses = []
        for i in range(4):
            kept = [
                math.exp(float(rows[i, 0] @ others[j, 0]) / 0.3)
                for j in range(4)
                if j == i or (other_ids[j] != other_ids[i] and row_ids[j] != row_ids[i])
            ]
            if others is target["embedding"] and target_ids[i] != 101:
                kept.append(math.exp(float(rows[i, 0] @ negative["embedding"][0, 0]) / 0.3))
            losses.append(math.log(sum(kept)) - float(rows[i, 0] @ others[i, 0]) / 0.3)
        return losses

    forward = direction(query["embedding"], target["embedding"], query_ids, target_ids)
    backward = direction(target["embedding"], query["embedding"], target_ids, query_ids)
    nll = sum(float(side["caption_nll"].sum()) for side in (query, target, negative))
    tokens = sum(sum(side) for side in TOKENS)
    return weights[0] * (sum(forward) + sum(backward)) / 8 + weights[1] * nll / tokens


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_loss_equals_a_loop_over_pairs_and_tokens(weights: tuple[float, float]) -> None:
    objective = MmGem(embedding_weight=weights[0], generation_weight=weights[1])
    result = objective(*sides(), a_batch(), FusionConfig())
    assert result.loss.item() == pytest.approx(slow_loss(*sides(), weights=weights), rel=1e-12)


def test_prefixes_of_the_vectors_count_in_the_embedding_loss_alone() -> None:
    weights = (0.5, 2.0)
    short = [
        {**side, "embedding": torch.nn.functional.normalize(side["embedding"][..., :3], dim=-1)}
        for side in sides()
    ]
    whole_loss, short_loss = (
        slow_loss(given[0], given[1], given[2], weights=weights) for given in (sides(), short)
    )
    objective = MmGem(embedding_weight=0.5, generation_weight=2.0, nested_dims=[3], nested_weights=[3.0])
    result = objective(*sides(), a_batch(), FusionConfig())
    assert result.loss.item() == pytest.approx((whole_loss + 3 * short_loss) / 4, rel=1e-12)
    assert short_loss != pytest.approx(whole_loss, rel=1e-3)


def test_gradients_of_the_loss_at_all_its_inputs() -> None:
    """The temperature's among them."""
    inputs = [side[name] for side in sides() for name in NAMES if name != "caption_tokens"]
    tokens = [side["caption_tokens"] for side in sides()]

    def loss(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        encoded = [
            {"caption_tokens": count, **{n: next(given) for n in NAMES if n != "caption_tokens"}}
            for count in tokens
        ]
        return MmGem()(encoded[0], encoded[1], encoded[2], a_batch(), FusionConfig()).loss

    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in inputs])


def test_a_batch_without_any_caption_has_no_generation_loss() -> None:
    silent = [{**side, "caption_tokens": side["caption_tokens"] * 0} for side in sides()]
    result = MmGem()(silent[0], silent[1], silent[2], a_batch(), FusionConfig())
    assert result.metrics["loss/generation"] == 0
    assert result.loss == result.metrics["loss/embedding"]


# ------------------------------------------------------------------ through the model

CHUNKINGS: tuple[int | TokenBudget, ...] = (1, 2, 12, TokenBudget(max_tokens=22))


def steps(chunkings: tuple[int | TokenBudget, ...] = CHUNKINGS) -> list[tuple[float, dict[str, Tensor]]]:
    """(loss, gradients) of this rank's half for each chunking. The second half has no image and no
    caption."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    objective, found = mm_gem_case.OBJECTIVE, []
    for chunking in chunkings:
        rows = global_rows(8, 0, rows_without_image=range(4, 8))
        local = rows[rank * 8 // world_size : (rank + 1) * 8 // world_size]
        model = tiny_model(0, head=objective.build_head(backbone_config()))
        engine = PlainEngine(model, 2)
        batch = mm_gem_case.prepared(batch_of(local, chunking, 0))
        result = train_step(engine, objective, FusionConfig(), batch)
        zero = torch.zeros(())
        gradients = {
            n: zero if p.grad is None else p.grad.clone() for n, p in engine.model.named_parameters()
        }
        found.append((result.loss.item(), gradients))
    return found


def backbone_config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(tiny_folder().name)


def test_ranks_and_chunks_equal_one_process_also_where_a_rank_has_no_caption() -> None:
    [(expected_loss, expected)] = steps((24,))
    results = run_ranks(steps, world_size=2)
    for index, chunking in enumerate(CHUNKINGS):
        loss = (results[0][index][0] + results[1][index][0]) / 2
        assert loss == pytest.approx(expected_loss, abs=1e-12), chunking
        for name, gradient in expected.items():
            torch.testing.assert_close(
                results[0][index][1][name], gradient, rtol=1e-8, atol=1e-11, msg=f"{chunking} {name}"
            )
    heads = {name: gradient for name, gradient in expected.items() if name.startswith("head.")}
    assert len(heads) == 19
    assert all(gradient.abs().max() > 1e-6 for gradient in heads.values()), "every part of the head learns"


def train_three_steps(stage: int, *, lora: bool = False) -> dict[str, Tensor]:
    """Parameters after three steps on this rank's half. stage 0: one process without DeepSpeed. One half has
    no image: the ranks have different numbers of images, regions and captions in each chunk."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    objective, local = mm_gem_case.OBJECTIVE, 8 // world_size
    model = tiny_model(0, lora=lora, head=objective.build_head(backbone_config()))
    engine = plain_engine(model) if stage == 0 else zero_engine(model, stage, rank)
    for step in range(3):
        rows = global_rows(8, 0, rows_without_image=range(4, 8), seed=step)
        chunk_size = 24 if stage == 0 else 3
        batch = batch_of(rows[rank * local : (rank + 1) * local], chunk_size, 0)
        assert train_step(engine, objective, FusionConfig(), mm_gem_case.prepared(batch)).applied
    return whole_parameters(model)


def plain_engine(model: torch.nn.Module) -> PlainEngine:
    optimizer = build_adamw([p for p in model.parameters() if p.requires_grad], OPTIMIZER)
    schedule = build_schedule(optimizer, OPTIMIZER, num_steps=3)

    class InFloat32(PlainEngine):
        def __init__(self) -> None:
            self.model, self.first_pass_chunks = model, 1

        def step(self) -> bool:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return True

    return InFloat32()


def zero_engine(model: torch.nn.Module, stage: int, rank: int) -> Any:
    from agff.engine import Engine, start_process_group

    return Engine(
        model,
        deepspeed_config=zero_config(stage, 4, clip=0.5),
        optimizer=OPTIMIZER,
        num_steps=3,
        autocast_dtype=None,
        device=start_process_group(rank),
        first_pass_chunks=2,
    )


def whole_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


ZERO_CASES = [(1, False), (2, True), (3, False), (3, True)]
"""Stage, LoRA; with LoRA the vision tower is frozen and its features are kept."""


def train_all() -> list[dict[str, Tensor]]:
    return [train_three_steps(stage, lora=lora) for stage, lora in ZERO_CASES]


@pytest.mark.timeout(600)
def test_zero_stages_equal_a_plain_optimizer_where_ranks_have_other_numbers_of_images() -> None:
    """A module with a tensor for each image made the ranks wait for each other under ZeRO-3."""
    expected = {lora: train_three_steps(0, lora=lora) for lora in (False, True)}
    initial = {
        lora: dict(
            tiny_model(
                0, lora=lora, head=mm_gem_case.OBJECTIVE.build_head(backbone_config())
            ).named_parameters()
        )
        for lora in (False, True)
    }
    for (stage, lora), found in zip(ZERO_CASES, run_ranks(train_all, world_size=2)[0], strict=True):
        trained = [name for name, parameter in initial[lora].items() if parameter.requires_grad]
        assert sum(name.startswith("head.") for name in trained) == 19
        for name in trained:
            update = expected[lora][name] - initial[lora][name].detach()
            difference = (found[name] - expected[lora][name]).norm() / update.norm()
            assert difference < 1e-3, f"stage {stage}, lora {lora}, {name}: {difference:.1e} of the update"


# ------------------------------------------------------------------ pairs

PICTURE = Image.new("RGB", (56, 56), "red")


def image_item(text: str = "") -> Item:
    return Item(text=f"{IMAGE_PLACEHOLDER}\n{text}", image=PICTURE, address="shard.tar:1: query")


@pytest.mark.parametrize(
    ("text", "instruction", "caption"),
    [
        ("a red heart", "", "a red heart"),
        ("Find a picture of this: a red heart\n", "Find a picture of this:", "a red heart"),
        ("say it: say it: twice", "say it:", "say it: twice"),
    ],
)
def test_an_image_learns_to_say_the_text_beside_it_on_either_side(
    text: str, instruction: str, caption: str
) -> None:
    other = Item(text=text, instruction=instruction)
    query, target = MmGem().items_of_pair("any", image_item(), other)
    assert (query.caption, target) == (caption, other)
    query, target = MmGem().items_of_pair("any", other, image_item())
    assert (query, target.caption) == (other, caption)


def test_pairs_of_two_images_or_two_texts_learn_nothing_to_say() -> None:
    for pair in ((image_item(), image_item("b")), (Item(text="a"), Item(text="b"))):
        assert MmGem().items_of_pair("any", *pair) == pair


def test_a_text_without_words_is_a_bad_sample() -> None:
    with pytest.raises(
        DataError, match=r"shard.tar:1: target: is empty, and the image beside it is to learn"
    ):
        MmGem().items_of_pair("any", image_item(), Item(text=" \n", address="shard.tar:1: target"))


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0.01}, r"loss.temperature=0.01 must be above 0.01 and below 1"),
        ({"temperature": 1.0}, r"loss.temperature=1.0 must be above 0.01 and below 1"),
        ({"embedding_weight": -1.0}, "loss.embedding_weight=-1.0 must be >= 0"),
        ({"generation_weight": -0.5}, "loss.generation_weight=-0.5 must be >= 0"),
        ({"embedding_weight": 0.0, "generation_weight": 0.0}, "generation_weight must not both be 0"),
        ({"grid": 0}, "loss.grid=0 must be >= 1"),
        ({"region_grid": 0}, "loss.region_grid=0 must be >= 1"),
        ({"nested_fine": [0]}, r"loss.nested_fine=\[0\]: an item has one vector with mm_gem"),
        ({"nested_dims": [4, 2]}, r"loss.nested_dims=\[4, 2\] must increase"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MmGem(**settings)


def test_a_backbone_with_deep_stack_levels_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from tests.agff.family_folders import BUILDERS

    BUILDERS["qwen3_vl"](tmp_path)
    with pytest.raises(ConfigError, match=r"mm_gem cannot train a backbone of type qwen3_vl: .* deep-stack"):
        MmGem().build_head(AutoConfig.from_pretrained(tmp_path))
