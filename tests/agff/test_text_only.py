"""Training on texts alone: the vision tower is neither called nor gathered, and the vectors stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.batch import Batch, Item
from agff.embedding_model import EmbeddingModel
from agff.engine import Engine, start_process_group
from agff.errors import ConfigError, DataError
from agff.families import family_of
from agff.objectives.contrastive import Contrastive
from agff.shared_images import IMAGE_IDS
from agff.similarity import FusionConfig
from agff.step import train_step
from agff.text_only import TextsAlone
from data_pipeline.collate import FixedRows, collate
from data_pipeline.decode import Example
from tests.agff.family_folders import BUILDERS
from tests.agff.test_flops import count, flops_of
from tests.agff.test_step import OPTIMIZER, zero_config
from tests.agff.test_vision import (
    PROMPTS,
    SQUARE,
    TEXTS,
    about,
    build,
    embedding_and_gradients,
    processor_of,
)
from tests.ranks import run_ranks

TRAINING: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraConfig(rank=2)},
    "full": {"freeze_vision": True},
}


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "backbone"
    BUILDERS[request.param](path)
    return path


def texts_alone(folder: Path) -> TextsAlone:
    return TextsAlone(processor_of(folder))


def count_calls(modules: Iterable[nn.Module]) -> Counter[str]:
    calls: Counter[str] = Counter()
    for module in modules:
        module.register_forward_pre_hook(lambda module, args: calls.update([type(module).__name__]))
    return calls


@pytest.mark.parametrize("training", TRAINING)
def test_without_a_blank_image_vectors_and_gradients_are_the_same(folder: Path, training: str) -> None:
    with_blank, without = processor_of(folder)(TEXTS), texts_alone(folder)(TEXTS)
    assert len(with_blank[IMAGE_IDS]) == 1
    assert len(without[IMAGE_IDS]) == 0
    family = processor_of(folder).family
    assert {*family.image_inputs, *family.tower_inputs}.isdisjoint(without)
    assert (without["input_ids"] != processor_of(folder).image_token_id).all()
    lengths = [processor_of(folder).num_tokens(item) for item in TEXTS]
    assert without["input_ids"].shape == (len(TEXTS), max(lengths))
    model = build(folder, dtype=torch.float64, **TRAINING[training])
    expected = embedding_and_gradients(model, lambda: model(with_blank)["embedding"])
    model = build(folder, dtype=torch.float64, text_only=True, **TRAINING[training])
    calls = count_calls(model.tower.module.modules())
    found = embedding_and_gradients(model, lambda: model(without)["embedding"])
    assert not calls
    for name, value in found.items():  # the blank image made a row longer: other blocks of products
        torch.testing.assert_close(value, expected.pop(name), rtol=1e-8, atol=1e-10)
    assert all(name.startswith("backbone.") and not rest.any() for name, rest in expected.items())


@pytest.mark.parametrize("training", TRAINING)
def test_what_only_images_reach_does_not_train(folder: Path, training: str) -> None:
    model = build(folder, text_only=True, **TRAINING[training])
    model(texts_alone(folder)(TEXTS))["embedding"].sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.tower.is_frozen


def test_no_vision_is_counted(folder: Path) -> None:
    config = BackboneConfig(
        path=str(folder), gradient_checkpointing=False, text_only=True, **TRAINING["lora"]
    )
    model = build(folder, text_only=True, **TRAINING["lora"])
    chunk = texts_alone(folder)(TEXTS)
    flops = flops_of(model, config, keeps_vision=True)
    shape = flops.shape(chunk)
    forward, both = count(model, chunk)
    assert flops.pass_1(shape) == forward.get_total_flops()
    assert flops.pass_2(shape) == both.get_total_flops()
    step = flops.step([shape, shape])
    assert (step.vision_forward, step.num_patches) == (0, 0)
    assert step.executed == flops.pass_1(shape) + 2 * flops.pass_2(shape)


def test_an_image_cannot_be_used(folder: Path) -> None:
    process = texts_alone(folder)
    item = Item(text="<|image_1|>\nwhat?", image=SQUARE, address="a.tar:1: query")
    for refuses in (lambda: process([TEXTS[0], item]), lambda: process.num_tokens(item)):
        with pytest.raises(
            DataError, match=r"^a.tar:1: query: has an image, .* texts alone \(backbone.text_only: true\)"
        ):
            refuses()


def test_a_tower_that_trains_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.text_only=true, but the vision tower trains"):
        BackboneConfig(path="", text_only=True)


# ---------------------------------------------------------------- ZeRO-3

CASES = [("qwen2_vl", "lora"), ("llava_onevision", "full"), ("qwen3_vl", "full")]


def texts_of(rank: int) -> list[Example]:
    return [
        Example(
            query=Item(text=f"{'very ' * number}heart"),
            target=Item(text=f"the {number} of {rank}"),
            query_id=10 * rank + number,
            target_id=100 + 10 * rank + number,
            address="",
        )
        for number in range(3)
    ]


def gathered_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that ZeRO-3 gathers from now on; filled later."""
    found: set[str] = set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        gather = parameter.all_gather_coalesced

        def recorded(params: Any, *args: Any, gather: Any = gather, **kwargs: Any) -> Any:
            params = list(params)
            found.update(names[id(each)] for each in params)
            return gather(params, *args, **kwargs)

        parameter.all_gather_coalesced = recorded
    return found


def step_of(folder: Path, training: str, text_only: bool) -> tuple[float, int, set[str], int]:
    """(loss of the second step, calls inside the tower, gathered parameters of the tower, of the rest)."""
    from transformers.integrations import HfDeepSpeedConfig

    rank, config = dist.get_rank(), zero_config(3, 3, clip=0.0)
    partitioned = HfDeepSpeedConfig(config)
    backbone = load_backbone(folder, dtype=torch.float32, attention="sdpa")
    choices = BackboneConfig(path=str(folder), text_only=text_only, **TRAINING[training])
    model = EmbeddingModel(choose_trainable(backbone, choices), PROMPTS)
    del partitioned
    engine = Engine(
        model,
        deepspeed_config=config,
        optimizer=OPTIMIZER,
        num_steps=9,
        autocast_dtype=None,
        device=torch.device("cpu"),
    )
    process = texts_alone(folder) if text_only else processor_of(folder)
    batch: Batch = collate(texts_of(rank), process, chunking=FixedRows(rows=2))
    train_step(engine, Contrastive(), FusionConfig(), batch)  # the first step learns the order of modules
    calls, gathered = count_calls(model.tower.module.modules()), gathered_parameters(model)
    loss = train_step(engine, Contrastive(), FusionConfig(), batch).loss.item()
    family = family_of(model.tower.model.config)
    vision = {name for name in gathered if f".{family.vision_tower}." in name}
    return loss, calls.total(), vision, len(gathered - vision)


def all_steps(folders: dict[str, Path]) -> list[tuple[Any, Any]]:
    start_process_group(dist.get_rank())
    return [
        (step_of(folders[family], training, True), step_of(folders[family], training, False))
        for family, training in CASES
    ]


@pytest.mark.timeout(300)
def test_zero3_gathers_nothing_of_the_tower(tmp_path: Path) -> None:
    folders = {family: tmp_path / family for family, _ in CASES}
    for family, path in folders.items():
        BUILDERS[family](path)
    for found in run_ranks(all_steps, folders, world_size=2):
        for case, ((loss, calls, vision, rest), with_blank) in zip(CASES, found, strict=True):
            assert (calls, vision) == (0, set()), case
            assert rest > 0
            assert with_blank[1] > 0
            assert with_blank[2]
            assert loss == pytest.approx(with_blank[0], rel=1e-5)


def test_use_embeds_images_again(folder: Path) -> None:
    """A model trained on texts alone, with the processor that use has."""
    items = [*TEXTS, about(SQUARE, "what?")]
    inputs = processor_of(folder)(items)
    with torch.no_grad():
        found, expected = (
            build(folder, text_only=text_only, **TRAINING["lora"])(inputs)["embedding"]
            for text_only in (True, False)
        )
    assert torch.equal(found, expected)
