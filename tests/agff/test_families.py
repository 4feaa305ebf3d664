"""What the backbones are given and what they then do, against transformers' own path, for each family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from agff.backbone import load_backbone
from agff.batch import HOST_INPUTS, IMAGE_PLACEHOLDER, Item, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from tests.agff.family_folders import BUILDERS, backbone_arguments

PROMPTS = PromptConfig(num_fine=2, tokens_per_prompt=2)
QWEN = [name for name in BUILDERS if name.startswith("qwen")]


def item(text: str, *size: int) -> Item:
    if not size:
        return Item(text=text)
    generator = torch.Generator().manual_seed(size[0] + 7 * size[1] + len(text))  # no two alike
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Item(text=f"{IMAGE_PLACEHOLDER}\n{text}", image=Image.fromarray(pixels.numpy()))


CHUNKS = {
    "texts": [item("a heart"), item("two red hearts and a circle"), item("three")],
    "images of one size": [item("what?", 90, 60), item("and this, in more words?", 90, 60)],
    "mixed": [
        item("what?", 300, 200),
        item("a heart"),
        item("and this, in more words?", 56, 56),
        item("wide", 500, 90),
        item("what?", 200, 300),
        item("", 56, 56),
    ],
}
"""Qwen2.5-VL: 300 x 200 has windows of nine lengths."""


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families") / request.param
    BUILDERS[request.param](path)
    return path


def processor_of(folder: Path) -> ItemProcessor:
    limits = ProcessorConfig() if folder.name == "llava_onevision" else ProcessorConfig(max_pixels=300 * 300)
    return ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=limits)


def with_large_weights(backbone: Any) -> EmbeddingModel:
    """Far from zero, so that no difference and no gradient is small by accident; the same for each call."""
    model = EmbeddingModel(backbone, PROMPTS)
    for index, parameter in enumerate(model.parameters()):
        torch.manual_seed(index)
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return model


def our_model(folder: Path, dtype: torch.dtype = torch.float32, *, attention: str = "sdpa") -> EmbeddingModel:
    return with_large_weights(load_backbone(folder, dtype=dtype, attention=attention))


def untouched_model(folder: Path, dtype: torch.dtype = torch.float32) -> EmbeddingModel:
    """transformers' own classes: a convolution, a loop over images."""
    from transformers import AutoModel

    return with_large_weights(
        AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    )


def padding_mask(inputs: ModelInputs) -> Tensor:
    length_B = inputs["prompt_start_B"] + PROMPTS.num_tokens
    return (torch.arange(inputs["input_ids"].shape[1]) < length_B[:, None]).long()


def own_arguments(processor: ItemProcessor, items: Sequence[Item], inputs: ModelInputs) -> dict[str, Any]:
    """What transformers' processors give: the mask, the kind of each token, the images."""
    images = [item.image for item in items if item.image] or [processor._blank_image()]
    ids = inputs["input_ids"]
    kinds = {"mm_token_type_ids": (ids == processor.image_token_id).int()}
    return {
        "input_ids": ids,
        "attention_mask": padding_mask(inputs),
        **processor.image_processor(images=images, return_tensors="pt"),
        **(kinds if processor.family.name in QWEN else {}),
    }


def embed(model: EmbeddingModel, arguments: dict[str, Any], inputs: ModelInputs) -> Tensor:
    """EmbeddingModel.forward with other arguments, without its float32."""
    states = model.backbone(**arguments, use_cache=False).last_hidden_state
    end_BM = inputs["prompt_start_B"][:, None] + model.block_end_M
    return torch.nn.functional.normalize(states[torch.arange(len(states))[:, None], end_BM], dim=-1)


def gradients(model: EmbeddingModel, embedding_BMD: Tensor) -> dict[str, Tensor]:
    """Of incoming weights of both signs."""
    weights = torch.randn(embedding_BMD.shape, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    (embedding_BMD * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of a parameter's gradient, relative to its largest entry over all parameters."""
    assert one.keys() == other.keys()
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


def as_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"pixel_values": arguments["pixel_values"].double()}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embeddings_and_gradients_equal_those_of_transformers_own_path(
    folder: Path, dtype: torch.dtype, chunk: str
) -> None:
    """Which has a padding mask, a convolution, a loop over images, and computes positions on the device.

    Equal up to the order of sums, 1e-6 of float32 and 1e-15 of float64; 3e-6 and 2e-15 were seen."""
    processor = processor_of(folder)
    inputs = processor(CHUNKS[chunk])
    ours, own = our_model(folder, dtype), untouched_model(folder, dtype)
    arguments = [backbone_arguments(ours.family, inputs), own_arguments(processor, CHUNKS[chunk], inputs)]
    if dtype == torch.float64:
        arguments = [as_double(each) for each in arguments]
    embeddings = [embed(model, each, inputs) for model, each in zip((ours, own), arguments, strict=True)]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(*embeddings, rtol=0, atol=tolerance)
    assert difference(gradients(ours, embeddings[0]), gradients(own, embeddings[1])) <= tolerance


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_padding_mask_would_change_nothing(folder: Path, chunk: str) -> None:
    """Embeddings are equal to the last bit. The gradient of keys and values that several heads share is
    summed in another order: 2e-7 was seen in float32, 5e-16 in float64."""
    model = our_model(folder, torch.float64)
    inputs = processor_of(folder)(CHUNKS[chunk])
    arguments = as_double(backbone_arguments(model.family, inputs))
    plain = embed(model, arguments, inputs)
    masked = embed(model, arguments | {"attention_mask": padding_mask(inputs)}, inputs)
    assert torch.equal(plain, masked)
    assert difference(gradients(model, plain), gradients(model, masked)) <= 1e-14
    single = model.float()
    arguments = backbone_arguments(single.family, inputs)
    with torch.no_grad():
        masked = embed(single, arguments | {"attention_mask": padding_mask(inputs)}, inputs)
        assert torch.equal(embed(single, arguments, inputs), masked)


class Calls(TorchFunctionMode):
    """Records the arguments of `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False))
            self.attention.append(named | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_language_model_attends_causally_without_a_mask_and_with_grouped_queries(
    folder: Path, chunk: str
) -> None:
    model = our_model(folder)
    inputs = processor_of(folder)(CHUNKS[chunk])
    with torch.no_grad(), Calls() as calls:
        model(inputs)
    width = inputs["input_ids"].shape[1]
    causal = [call for call in calls.attention if call.get("is_causal")]
    assert len(causal) == model.backbone.config.get_text_config().num_hidden_layers
    for call in causal:
        assert call["attn_mask"] is None
        assert call["enable_gqa"]
        assert call["query"].shape[1:3] == (2, width)
        assert call["key"].shape[1:3] == (1, width), "keys and values are not repeated for each head"
    assert all(call.get("attn_mask") is None for call in calls.attention)


def test_vision_attention_is_called_once_for_each_length_in_a_layer(folder: Path) -> None:
    """Whatever the number of images. LLaVA-OneVision's views are a batch."""
    model, processor = our_model(folder), processor_of(folder)
    for repetitions in (1, 3):
        inputs = processor(CHUNKS["mixed"] * repetitions)
        with torch.no_grad(), Calls() as calls:
            model(inputs)
        num_calls = sum(not call.get("is_causal") for call in calls.attention)
        in_a_layer = len(inputs["image_lengths"].unique()) if "image_lengths" in inputs else 1
        if "window_lengths" in inputs:  # in one of the two layers
            assert num_calls == in_a_layer + len(inputs["window_lengths"].unique())
        else:
            assert num_calls == 2 * in_a_layer


class DeviceReads(TorchFunctionMode):
    """Counts what would make the host wait for a device: values and sizes that depend on tensors, but for
    tensors that are made of `host` ones alone."""

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")
    READS += ("masked_select", "unique_consecutive", "__contains__", "cpu", "numpy")

    def __init__(self, host: Sequence[Tensor]) -> None:
        super().__init__()
        self.host = list(host)
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        of_host = bool(tensors) and all(any(t is known for known in self.host) for t in tensors)
        name = getattr(func, "__name__", "")
        if not of_host and tensors and self._reads(name, args, kwargs):
            self.found.append(name)
        result = func(*args, **kwargs)
        if of_host:
            self.host += [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        return result

    def _reads(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
        if name == "repeat_interleave":
            return "output_size" not in kwargs and not isinstance(args[1], int)
        return name in self.READS


def device_reads(model: EmbeddingModel, inputs: ModelInputs) -> list[str]:
    with torch.no_grad(), DeviceReads([inputs[name] for name in HOST_INPUTS if name in inputs]) as reads:
        model(inputs)
    return reads.found


def deeper(folder: Path, target: Path, num_layers: int) -> Path:
    """The backbone with that many layers in tower and language model, of random weights."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = num_layers
    config.text_config.layer_types = ["full_attention"] * num_layers
    AutoModel.from_config(config).save_pretrained(target / str(num_layers))
    return target / str(num_layers)


EXPECTED_READS = {
    "qwen2_vl": ["item"],  # transformers compares the number of image tokens with that of embeddings
    "qwen2_5_vl": ["item"],
    "qwen3_vl": ["item", "__getitem__", "__setitem__"],  # and two for each deep-stack level
    "llava_onevision": ["item", "__bool__"],  # and asks whether sequences are packed
}


def test_a_forward_reads_a_fixed_few_values_from_the_device(folder: Path, tmp_path: Path) -> None:
    """Whatever the number of images and of layers; a host that reads waits for all that was queued."""
    processor = processor_of(folder)
    for num_layers in (2, 4):
        backbone = load_backbone(deeper(folder, tmp_path, num_layers), dtype=torch.float32, attention="sdpa")
        model = EmbeddingModel(backbone, PROMPTS)
        for chunk in (CHUNKS["texts"], CHUNKS["mixed"], CHUNKS["mixed"] * 3):
            assert device_reads(model, processor(chunk)) == EXPECTED_READS[folder.name]
    own = untouched_model(folder)
    inputs = processor(CHUNKS["mixed"])
    with torch.no_grad(), DeviceReads([]) as reads:
        embed(own, own_arguments(processor, CHUNKS["mixed"], inputs), inputs)
    assert len(reads.found) > 10 * len(EXPECTED_READS[folder.name]), "the counter sees transformers' own"
