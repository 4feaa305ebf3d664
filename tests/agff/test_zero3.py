"""ZeRO-3 on models from folders: gathered layer by layer, right gradients, torch's own linear afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from agff.backbone import BackboneConfig, choose_trainable, load_backbone
from agff.batch import Item, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.engine import Engine, start_process_group
from agff.errors import TrainingError
from agff.optimizer import OptimizerConfig
from agff.processor import ItemProcessor, ProcessorConfig
from agff.zero3 import RESIDENT_ELEMENTS, SMALLEST_BUCKET, fill_in, leaving_linear, whole_modules
from tests.agff.family_folders import BUILDERS
from tests.agff.test_engine import PROMPTS, TRAINING
from tests.agff.test_step import zero_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)

CASES = [*product(BUILDERS, TRAINING, (True,)), *product(("qwen2_vl", "llava_onevision"), TRAINING, (False,))]
"""Family, what trains, gradient checkpointing."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What steps of one and of three chunks did on one rank."""

    worst: float
    """Largest difference of a gradient to plain torch, of the largest gradient."""
    num_gradients: int
    fetches: dict[int, int]
    """Calls of `fetch_sub_module` in a step of this many chunks."""
    gathers: dict[int, int]
    linear_is_torch_s: bool
    python_linears: int
    """Nodes of DeepSpeed's own linear in the graph of a forward."""
    trace_complete: list[bool]
    """Whether each forward and backward of a second step of three chunks knew what comes next, to its end."""


def model_of(folder: Path, training: str, checkpointing: bool) -> EmbeddingModel:
    config = BackboneConfig(path=str(folder), gradient_checkpointing=checkpointing, **TRAINING[training])
    backbone = load_backbone(folder, dtype=torch.float32, attention="sdpa")
    model = EmbeddingModel(choose_trainable(backbone, config), PROMPTS)
    for name, parameter in model.named_parameters():  # half of them would be zero, the others random
        if "lora_" in name or name.endswith("vectors"):
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def partitioned_engine(folder: Path, training: str, checkpointing: bool, **zero: Any) -> Engine:
    from transformers.integrations import HfDeepSpeedConfig

    config = zero_config(3, 2, clip=0.0)
    config["zero_optimization"] |= zero
    partitioned = HfDeepSpeedConfig(leaving_linear(config))
    model = model_of(folder, training, checkpointing)
    del partitioned
    return Engine(
        model,
        deepspeed_config=config,
        optimizer=OptimizerConfig(learning_rate=1e-12),
        num_steps=9,
        autocast_dtype=None,
        device=torch.device("cpu"),
    )


def chunks_of(folder: Path, num_chunks: int, rank: int) -> list[ModelInputs]:
    """On rank 1 without any image."""
    processor = ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())
    chunks = []
    for index in range(num_chunks):
        image = Image.new("RGB", (56, 56), ("red", "blue", "green")[index])
        text = Item(text=("a heart", "one", "a star and a moon")[index])
        chunks.append(processor([text] if rank else [text, Item(text="<|image_1|>", image=image)]))
    return chunks


def weights_of(num_chunks: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(1 if rank else 2, 3, 32, generator=generator) for _ in range(num_chunks)]


def accumulate(engine: Any, chunks: Sequence[ModelInputs], weights: Sequence[Tensor]) -> list[bool]:
    """As a step does: a frozen tower once, then no graph but the first chunk's, which comes last in pass 1;
    its backward, then the others again one by one."""
    complete = []
    chunks = engine.with_image_features(chunks)

    def note() -> None:
        if hasattr(engine, "deepspeed"):
            complete.append(coordinator(engine).is_complete_trace())

    def encode(inputs: ModelInputs) -> Tensor:
        output = engine.encode(inputs)["embedding"]
        note()
        return output

    def backward(loss: Tensor, is_last: bool) -> None:
        engine.backward(loss, is_last)
        note()

    first, *others = zip(chunks, weights, strict=True)
    for inputs, _ in others:
        with torch.no_grad():
            encode(inputs)
    backward((encode(first[0]) * first[1]).sum(), not others)
    for index, (inputs, weight) in enumerate(others):
        backward((encode(inputs) * weight).sum(), index == len(others) - 1)
    return complete


class PlainEngine:
    def __init__(self, model: nn.Module) -> None:
        self.encode = model

    def with_image_features(self, chunks: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
        return chunks

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()


@cache
def plain_gradients(folder: Path, training: str, num_chunks: int) -> dict[str, Tensor]:
    """Mean over both ranks, in one process without ZeRO."""
    model = model_of(folder, training, checkpointing=False)
    for rank in (0, 1):
        accumulate(PlainEngine(model), chunks_of(folder, num_chunks, rank), weights_of(num_chunks, rank))
    return {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}


def coordinator(engine: Engine) -> Any:
    return engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()


def python_linears(output: Tensor) -> int:
    seen, waiting, count = set(), [output.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += "LinearFunctionForZeroStage3" in type(node).__name__
        waiting += [following for following, _ in node.next_functions]
    return count


def measure(folder: Path, training: str, checkpointing: bool, **zero: Any) -> Measured:
    from deepspeed.utils import safe_get_full_grad

    engine = partitioned_engine(folder, training, checkpointing, **zero)
    calls, fetch = [0], coordinator(engine).fetch_sub_module

    def counted(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        fetch(*args, **kwargs)

    coordinator(engine).fetch_sub_module = counted
    rank, worst, fetches, gathers, compared = dist.get_rank(), 0.0, {}, {}, 0
    for num_chunks in (1, 3):
        expected = plain_gradients(folder, training, num_chunks)
        largest = max(gradient.abs().max() for gradient in expected.values())
        chunks, weights = chunks_of(folder, num_chunks, rank), weights_of(num_chunks, rank)
        accumulate(engine, chunks, weights)  # the first step learns the order of modules
        engine.step()
        calls[0], before = 0, engine.gathers.count
        complete = accumulate(engine, chunks, weights)
        fetches[num_chunks], gathers[num_chunks] = calls[0], engine.gathers.count - before
        for name, parameter in engine.model.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                difference = gradient - expected.get(name, 0)  # nothing uses SigLIP's last norm
                worst = max(worst, float(difference.abs().max() / largest))
                compared += 1
        engine.step()
    linear = nn.functional.linear
    nodes = python_linears(engine.encode(chunks[0])["embedding"])
    return Measured(
        worst=worst,
        num_gradients=compared,
        fetches=fetches,
        gathers=gathers,
        linear_is_torch_s=linear is torch._C._nn.linear,
        python_linears=nodes,
        trace_complete=complete,
    )


def measure_all(folders: dict[str, Path]) -> tuple[list[Measured], list[Measured], str]:
    """Of all cases; of Qwen2-VL without leaves; and what is said where a leaf is unsafe."""
    start_process_group(dist.get_rank())
    none = {"leaf_module": {"classes": []}}
    found = [measure(folders[family], *case) for family, *case in CASES]
    before = [measure(folders["qwen2_vl"], training, True, **none) for training in TRAINING]
    unsafe = {"leaf_module": {"classes": ["SiglipEncoderLayer"]}}
    engine = partitioned_engine(folders["llava_onevision"], "full", False, **unsafe)
    accumulate(engine, chunks_of(folders["llava_onevision"], 1, 0), weights_of(1, 0))
    with pytest.raises(TrainingError) as caught:
        engine.step()
    assert caught.value.on_all_ranks, "each of them is here"
    return found, before, str(caught.value)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Measured], list[Measured], str]:
    root = tmp_path_factory.mktemp("families")
    for family, build in BUILDERS.items():
        build(root / family)
    return run_ranks(
        measure_all, {family: root / family for family in BUILDERS}, world_size=2, timeout_s=500
    )[0]


def test_layers_gathered_whole_have_the_gradients_of_plain_torch(
    measured: tuple[list[Measured], list[Measured], str],
) -> None:
    for case, found in zip(CASES, measured[0], strict=True):
        assert found.num_gradients > 40, case
        assert found.worst < 1e-4, case  # of float32 sums in another order; LLaVA with LoRA 2e-5, else 2e-7


def test_layers_gathered_whole_are_fetched_four_times_less(
    measured: tuple[list[Measured], list[Measured], str],
) -> None:
    """DeepSpeed's hooks are host time: two autograd functions and a fetch for each module that is no leaf."""
    after = measured[0][: len(TRAINING)]
    for found, before in zip(after, measured[1], strict=True):
        for num_chunks in (1, 3):
            assert found.fetches[num_chunks] < before.fetches[num_chunks] / 3.8
            assert found.gathers[num_chunks] < before.gathers[num_chunks] / 4
        assert found.fetches[3] < 4.6 * found.fetches[1], "three chunks are five forwards, three backwards"


def test_deepspeed_knows_what_comes_next_in_both_passes(
    measured: tuple[list[Measured], list[Measured], str],
) -> None:
    """Else it gathers nothing ahead.

    A tower that runs once a step runs before the model's forward, where DeepSpeed knows of nothing that would
    follow, and it learns the order anew twice: in the first forward of pass 1, which has no backward, so that
    the backward of the chunk with the graph goes past what it knows, and in the first chunk of pass 2. These
    gather nothing ahead: of the language model 2 forwards and 2 backwards, whatever the number of chunks. The
    tower itself, once instead of twice a chunk, gathers nothing ahead either.
    """
    kept = [False, True, True, False, *(False, False), *(True, True)]
    for case, found in zip(CASES, measured[0], strict=True):
        assert found.trace_complete == ([True] * 8 if case[1] == "full" else kept), case


def test_deepspeed_s_linear_is_used_where_it_saves_memory_and_left_nowhere(
    measured: tuple[list[Measured], list[Measured], str],
) -> None:
    """A layer that is recomputed keeps its weights only while it is gathered anyway."""
    for (_, _, checkpointing), found in zip(CASES, measured[0], strict=True):
        assert found.linear_is_torch_s
        assert (found.python_linears == 0) == checkpointing


def test_a_leaf_that_would_lose_gradients_stops_the_run(
    measured: tuple[list[Measured], list[Measured], str],
) -> None:
    assert (
        "ZeRO-3 left the gradients of 16 parameters out of the update, backbone.vision_tower." in measured[2]
    )


def test_sizes_left_out_come_from_the_model_and_written_ones_win() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_key_value_heads": 4}
    config = Qwen2VLConfig(
        text_config=text | {"num_attention_heads": 28, "num_hidden_layers": 28}, vision_config={"depth": 1}
    )
    with torch.device("meta"):
        model = Qwen2VLModel(config)
    layer = sum(parameter.numel() for parameter in model.language_model.layers[0].parameters())
    assert layer > 4 * SMALLEST_BUCKET, "of a 7B"
    empty = {"stage": 3}
    filled = fill_in({"zero_optimization": empty}, model)["zero_optimization"]
    assert filled["stage3_prefetch_bucket_size"] == filled["reduce_bucket_size"] == layer
    threshold = filled["stage3_param_persistence_threshold"]
    resident = [p.numel() for p in model.parameters() if p.numel() <= threshold]
    assert 18944 <= threshold < 3584 * 512, "biases, not the smallest matrices of the decoder"
    assert sum(resident) <= RESIDENT_ELEMENTS
    written = {"stage": 3, "prefetch_bucket_size": 1, "stage3_param_persistence_threshold": 2}
    kept = fill_in({"zero_optimization": written}, model)["zero_optimization"]
    assert {name: kept[name] for name in written} == written
    assert "stage3_prefetch_bucket_size" not in kept, "it is the same key"
    assert fill_in({"zero_optimization": {"stage": 2}}, model) == {"zero_optimization": {"stage": 2}}
    small = torch.nn.Linear(2, 2)
    for threshold, is_partitioned in ((3, True), (4, False)):
        zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
        filled = fill_in({"zero_optimization": zero}, small)["zero_optimization"]
        assert filled["memory_efficient_linear"] == is_partitioned, "a gathered weight is what it saves"


def test_what_is_gathered_whole_is_there_in_every_family(tmp_path: Path) -> None:
    for family, build in BUILDERS.items():
        build(tmp_path / family)
        kinds = [
            type(module).__name__ for module in whole_modules(model_of(tmp_path / family, "lora", False))
        ]
        assert sum("DecoderLayer" in kind for kind in kinds) == 2, family
        assert sum("Block" in kind or "EncoderLayer" in kind for kind in kinds) == 2, family
