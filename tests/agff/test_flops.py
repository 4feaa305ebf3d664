"""Formulas against torch's own counter, for every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModel

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.batch import Batch, Encoded, Item, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.families import FAMILIES
from agff.flops import ModelFlops
from agff.joined import encode_joined
from agff.kept_vision import with_image_features
from agff.layer_flops import ATTENTIONS, NEEDED_ATTENTION, Attention
from agff.objectives.objective import Objective, ObjectiveResult
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
from agff.step import train_step
from agff.vision_flops import VISION_FLOPS
from tests.agff.family_folders import BUILDERS

PROMPTS = PromptConfig(num_fine=2)
CHOICES = {"full": {}, "frozen": {"freeze_vision": True}, "lora": {"lora": LoraConfig(rank=2)}}
COUNTED = {"eager": ATTENTIONS["eager"], "sdpa": Attention(skips_future=False, backward_products=5)}
"""As the counter counts each: of the fused kernel the full square."""
ITEMS = [
    Item(text="a heart"),
    Item(text="<|image_1|>\nwhat is it?", image=Image.new("RGB", (200, 140), "red")),
    Item(text="<|image_1|>", image=Image.new("RGB", (28, 112), "blue")),
]


class Counter(FlopCounterMode):
    """torch's counter, which does not know the fused attention of a CPU."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        super().__init__(
            display=False,
            custom_mapping={
                aten._scaled_dot_product_flash_attention_for_cpu: (
                    lambda query, key, value, *_, out_shape, **__: sdpa_flop_count(query, key, value)
                ),
                aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                    lambda grad, query, key, value, *_, out_shape, **__: sdpa_backward_flop_count(
                        grad, query, key, value
                    )
                ),
            },
        )


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "backbone"
    BUILDERS[request.param](path)
    return path


def build(folder: Path, config: BackboneConfig) -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = load_backbone(folder, dtype=torch.float32, attention=config.attention)
    return EmbeddingModel(choose_trainable(backbone, config), PROMPTS)


def flops_of(
    model: EmbeddingModel, config: BackboneConfig, *, keeps_vision: bool = False, first_pass_chunks: int = 1
) -> ModelFlops:
    return ModelFlops.of_config(
        model.backbone.config,
        config,
        PROMPTS,
        keeps_vision=keeps_vision,
        first_pass_chunks=first_pass_chunks,
        attention=COUNTED[config.attention],
    )


def count(model: EmbeddingModel, chunk: ModelInputs) -> tuple[Counter, Counter]:
    """Of a forward without a graph, and of forward and backward."""
    with Counter() as forward, torch.no_grad():
        model(chunk)
    with Counter() as both:
        rows = model(chunk)["embedding"]
        (rows * torch.rand_like(rows)).sum().backward()
    return forward, both


def test_every_family_is_counted() -> None:
    assert set(VISION_FLOPS) == set(FAMILIES)


def test_every_attention_is_counted() -> None:
    assert set(ATTENTIONS) == set(get_args(get_type_hints(BackboneConfig)["attention"]))


@pytest.mark.parametrize("attention", COUNTED)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_formulas_equal_the_counter(
    folder: Path, choices: dict[str, Any], checkpointing: bool, attention: Any
) -> None:
    """To the last operation: both passes, with images and without."""
    config = BackboneConfig(
        path=str(folder), gradient_checkpointing=checkpointing, attention=attention, **choices
    )
    model = build(folder, config)
    process = ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())
    flops = flops_of(model, config)
    for items in (ITEMS, ITEMS[:1]):
        chunk = process(items)
        shape = flops.shape(chunk)
        assert shape.lengths == tuple(process.num_tokens(item) for item in items)
        assert shape.has_real_images == (len(items) > 1)
        forward, both = count(model, chunk)
        assert flops.pass_1(shape) == forward.get_total_flops()
        assert flops.pass_2(shape) == both.get_total_flops()


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_a_pooling_head_that_nobody_reads_is_counted_as_it_runs(
    choices: dict[str, Any], tmp_path: Path
) -> None:
    """SiglipVisionConfig has one where a configuration does not say vision_use_head."""
    BUILDERS["llava_onevision"](tmp_path)
    written = AutoConfig.from_pretrained(tmp_path)
    written.vision_config.vision_use_head = True
    AutoModel.from_config(written).save_pretrained(tmp_path)
    config = BackboneConfig(path=str(tmp_path), **choices)
    model = build(tmp_path, config)
    chunk = ItemProcessor.from_folder(tmp_path, prompts=PROMPTS, limits=ProcessorConfig())(ITEMS)
    flops = flops_of(model, config)
    forward, both = count(model, chunk)
    assert flops.pass_1(flops.shape(chunk)) == forward.get_total_flops()
    assert flops.pass_2(flops.shape(chunk)) == both.get_total_flops()


@dataclass(frozen=True, kw_only=True)
class NoProducts(Objective):
    """A loss without a matrix product."""

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        loss_B = (query["embedding"] * target["embedding"]).sum(dim=(1, 2))
        return ObjectiveResult(loss=loss_B.mean(), metrics={}, pair_loss_B=loss_B.detach())


@dataclass
class PlainEngine:
    encode: EmbeddingModel
    keeps_vision: bool
    first_pass_chunks: int

    def encode_together(self, chunks: Sequence[ModelInputs]) -> list[Encoded]:
        return encode_joined(self.encode, chunks, self.encode.family)

    def with_image_features(self, chunks: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
        if not self.keeps_vision or len(chunks) == 1 or not self.encode.tower.is_frozen:
            return chunks
        with torch.no_grad():
            return with_image_features(
                chunks,
                self.encode.tower,
                encode=self.encode.encode_images,
                keep=lambda features: features,
                agree=lambda num_calls: num_calls,
            )

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self) -> bool:
        return True


@pytest.mark.parametrize(("keeps_vision", "first_pass_chunks"), [(False, 1), (False, 2), (True, 3)])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_what_a_training_step_executes(
    folder: Path, choices: dict[str, Any], keeps_vision: bool, first_pass_chunks: int
) -> None:
    """Chunks with and without images, one image of several chunks and rows, fillers; the first chunk is not
    run twice, a kept tower once for each different image, and pass 1 pads the chunks that it joins."""
    config = BackboneConfig(path=str(folder), attention="eager", **choices)
    model = build(folder, config)
    process = ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())
    flops = flops_of(model, config, keeps_vision=keeps_vision, first_pass_chunks=first_pass_chunks)
    groups = ([ITEMS[1], ITEMS[2], ITEMS[1]], ITEMS[:1], ITEMS[2:])
    batch = Batch(
        chunks=tuple(map(process, groups)),
        row_of_item_R=torch.arange(4),
        query_ids_B=torch.arange(2),
        target_ids_B=torch.arange(2),
        negative_ids_N=torch.empty(0, dtype=torch.int64),
        addresses=("a", "b"),
        filler=process([Item(text="")]),
    )
    engine = PlainEngine(model, keeps_vision, first_pass_chunks)
    for num_chunks in (3, 4):
        padded = batch.padded_to(num_chunks=num_chunks, num_negatives=0)
        with Counter() as counter:
            train_step(engine, NoProducts(), FusionConfig(), padded)
        assert flops.of_batch(padded).executed == counter.get_total_flops()


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_what_is_needed_is_what_remains_without_padding_and_recompute(
    folder: Path, choices: dict[str, Any]
) -> None:
    """Of rows that have no padding, with attention counted as needed, executed and needed are the same."""
    config = BackboneConfig(path=str(folder), gradient_checkpointing=False, **choices)
    process = ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())
    flops = ModelFlops.of_config(
        AutoConfig.from_pretrained(folder),
        config,
        PROMPTS,
        keeps_vision=True,
        first_pass_chunks=1,
        attention=NEEDED_ATTENTION,
    )
    shape = flops.shape(process(ITEMS[1:2]))
    step = flops.step([shape])
    assert step.useful == step.executed == flops.pass_2(shape)
    assert flops.step([shape, replace(shape, lengths=(), has_real_images=False)]).useful == step.useful
    forward = step.needed - step.useful
    if "lora" in choices:
        assert step.needed > step.vision_forward + 3 * step.language_forward
        assert step.language_forward < forward < 1.2 * step.language_forward, "the adapters' share"
    elif choices:
        assert step.language_forward <= forward < step.vision_forward + step.language_forward
    else:
        assert forward == step.vision_forward + step.language_forward
    text = flops.step([flops.shape(process(ITEMS[:1]))])
    assert (text.vision_forward, text.num_patches) == (0, 0), "the blank image is no use"
    assert text.executed > text.useful
    assert step.num_tokens == step.num_padded_tokens == shape.padded_length
