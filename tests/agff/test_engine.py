"""Which device a rank takes, and what models from folders keep and compute under the engine.

That the result is right: test_step.py and test_checkpoint.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.batch import Item, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.engine import Engine, start_process_group
from agff.errors import ConfigError
from agff.families import QwenVL, family_of
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from tests.agff.family_folders import BUILDERS, flat_qwen, published, write_published
from tests.agff.test_step import OPTIMIZER, zero_config
from tests.agff.tiny import IMAGE_TOKEN, VOCABULARY
from tests.ranks import run_ranks


@pytest.mark.parametrize(("num_visible", "local_rank", "expected"), [(8, 3, 3), (1, 3, 0), (1, 0, 0)])
def test_a_rank_that_sees_one_device_alone_takes_it(
    monkeypatch: pytest.MonkeyPatch, num_visible: int, local_rank: int, expected: int
) -> None:
    """With Slurm's --gpus-per-task each rank sees one device, as number 0."""
    taken: list[int] = []
    accelerator = SimpleNamespace(
        device_name=lambda index=None: "cuda" if index is None else f"cuda:{index}",
        device_count=lambda: num_visible,
        communication_backend_name=lambda: "nccl",
        set_device=taken.append,
    )
    monkeypatch.setattr("agff.engine.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(
        deepspeed, "init_distributed", lambda **_: taken.append(int(os.environ["LOCAL_RANK"]))
    )
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed asserts that they are equal
        monkeypatch.setenv(name, str(local_rank))
    device = start_process_group(local_rank)
    assert device.index == expected
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(expected)
    assert taken == [expected, expected], "DeepSpeed's, which it reads from LOCAL_RANK, and ours"


class SdpaKernels(TorchDispatchMode):
    """Names of torch's attention kernels that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(function):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "is_fused"), [(torch.bfloat16, False), (None, True)])
def test_attention_in_16_bit_on_a_cpu_is_plain_products(dtype: torch.dtype | None, is_fused: bool) -> None:
    engine = Engine.__new__(Engine)
    engine.device, engine._autocast_dtype = torch.device("cpu"), dtype
    rows = [torch.randn(2, 2, 8, 16, dtype=dtype or torch.float32, requires_grad=True) for _ in range(3)]
    with SdpaKernels() as kernels, engine._attention():
        nn.functional.scaled_dot_product_attention(*rows).sum().backward()
    assert bool(kernels.names) == is_fused, kernels.names


# ---------------------------------------------------------------- models from folders

PROMPTS = PromptConfig(num_fine=2)
TRAINING: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen vision": {"freeze_vision": True},
    "lora": {"lora": LoraConfig(rank=2)},
}
CASES = [
    *product(BUILDERS, (3,), TRAINING, (True,)),
    *product(("qwen2_vl",), (1,), TRAINING, (True,)),
    *product(("qwen2_vl",), (1, 3), ("full", "lora"), (False,)),
]
"""Family, ZeRO stage, what trains, gradient checkpointing."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a forward and backward of a text and an image did in a model of 2 decoder layers and 2 blocks."""

    recomputed_layers: int
    recomputed_blocks: int
    vision_has_graph: bool
    applied: bool


def engine_of(folder: Path, stage: int, choices: dict[str, Any], checkpointing: bool) -> Engine:
    """As launcher/run/model.py and train.py build it: under ZeRO-3 partitioned while loading."""
    from transformers.integrations import HfDeepSpeedConfig

    config = BackboneConfig(path=str(folder), gradient_checkpointing=checkpointing, **choices)
    deepspeed_config = zero_config(stage, 1, clip=1.0)
    partitioned = HfDeepSpeedConfig(deepspeed_config) if stage == 3 else None
    backbone = load_backbone(folder, dtype=torch.float32, attention="sdpa")
    model = EmbeddingModel(choose_trainable(backbone, config), PROMPTS)
    del partitioned
    return Engine(
        model,
        deepspeed_config=deepspeed_config,
        optimizer=OPTIMIZER,
        num_steps=2,
        autocast_dtype=None,
        device=torch.device("cpu"),
    )


def tower_modules(engine: Engine) -> list[nn.Module]:
    backbone = engine.model.backbone
    model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    return list(model.get_submodule(family_of(model.config).vision_tower).modules())


def observe(folder: Path, stage: int, training: str, checkpointing: bool) -> Observed:
    from transformers.modeling_layers import GradientCheckpointingLayer

    engine = engine_of(folder, stage, TRAINING[training], checkpointing)
    vision = tower_modules(engine)
    outputs: list[Tensor] = []
    runs: Counter[str] = Counter()
    for module in vision:
        module.register_forward_hook(lambda module, args, output: outputs.extend(tree_leaves(output)))
    for layer in engine.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # its own hooks stay outside of what is recomputed
            kind = "block" if layer in vision else "layer"
            first = next(layer.children())
            first.register_forward_hook(lambda module, args, output, kind=kind: runs.update([kind]))
    processor = ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())
    picture = Item(text="<|image_1|>", image=Image.new("RGB", (56, 56), "red"))
    embeddings = engine.encode(processor([Item(text="a heart"), picture]))["embedding"]
    assert runs == {"layer": 2, "block": 2}
    engine.backward((embeddings * torch.randn(embeddings.shape)).sum(), True)
    return Observed(
        recomputed_layers=runs["layer"] - 2,
        recomputed_blocks=runs["block"] - 2,
        vision_has_graph=any(isinstance(x, Tensor) and x.requires_grad for x in outputs),
        applied=engine.step(),
    )


def loaded_in_parts(folder: Path) -> dict[str, Tensor]:
    """The backbone's whole weights after ZeRO-3 has partitioned them while loading. Collective."""
    from transformers.integrations import HfDeepSpeedConfig

    partitioned = HfDeepSpeedConfig(zero_config(3, 1, clip=1.0))
    backbone = load_backbone(folder, dtype=torch.float32, attention="sdpa")
    del partitioned
    assert all(parameter.ds_tensor.numel() < parameter.ds_numel for parameter in backbone.parameters())
    with deepspeed.zero.GatheredParameters(list(backbone.parameters())):
        return {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}


def refusal_in_parts(folder: Path, changed: Path) -> str:
    """What loading under ZeRO-3 says of weights that are wider than the configuration. Collective."""
    from transformers.integrations import HfDeepSpeedConfig

    if dist.get_rank() == 0:
        shutil.copytree(folder, changed)
        config = json.loads((changed / "config.json").read_text())
        config["intermediate_size"] //= 2
        (changed / "config.json").write_text(json.dumps(config))
    dist.barrier()
    partitioned = HfDeepSpeedConfig(zero_config(3, 1, clip=1.0))
    message = ""
    try:
        load_backbone(changed, dtype=torch.float32, attention="sdpa")
    except ConfigError as error:  # on rank 0 alone, when all have been through the collectives
        message = str(error)
    del partitioned
    return message


def observe_all(
    folders: dict[str, Path],
) -> tuple[dict[str, dict[str, Tensor]], list[Observed], str]:
    start_process_group(dist.get_rank())
    weights = {family: loaded_in_parts(folder) for family, folder in folders.items()}
    observed = [observe(folders[family], *case) for family, *case in CASES]
    return weights, observed, refusal_in_parts(folders["qwen2_vl"], folders["qwen2_vl"].parent / "changed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family, in its published layout."""
    found = {}
    for family, build in BUILDERS.items():
        root = tmp_path_factory.mktemp(family)
        build(root / "today")
        found[family] = published(root / "today", root / "published")
    return found


@pytest.fixture(scope="module")
def observed(folders: dict[str, Path]) -> tuple[dict[str, dict[str, Tensor]], list[Observed], str]:
    return run_ranks(observe_all, folders, world_size=2)[0]


def test_every_layer_that_needs_a_gradient_is_recomputed_and_a_frozen_tower_has_no_graph(
    observed: tuple[Any, list[Observed], str],
) -> None:
    for case, found in zip(CASES, observed[1], strict=True):
        _, _, training, checkpointing = case
        expected = Observed(
            recomputed_layers=2 if checkpointing else 0,
            recomputed_blocks=2 if checkpointing and training == "full" else 0,
            vision_has_graph=training == "full",
            applied=True,
        )
        assert found == expected, case


def test_weights_of_another_shape_are_named_under_zero_3_too(observed: tuple[Any, Any, str]) -> None:
    assert "6 weights have another shape than config.json says, " in observed[2]


def test_published_folders_load_partitioned_with_the_same_weights(
    folders: dict[str, Path], observed: tuple[dict[str, dict[str, Tensor]], Any, str]
) -> None:
    for family, folder in folders.items():
        expected = load_backbone(folder, dtype=torch.float32, attention="sdpa")
        found = observed[0][family]
        assert found.keys() == dict(expected.named_parameters()).keys()
        for name, parameter in expected.named_parameters():
            assert torch.equal(found[name], parameter), f"{family} {name}"


HIDDEN, VISION_HIDDEN = 1536, 1280
MEMORY_CASES = [("full", True), ("lora", True), ("lora", False)]


def qwen2_vl_2b_of_two_layers(folder: Path) -> None:
    """Widths of Qwen2-VL-2B, 2 decoder layers, 2 vision blocks, a vocabulary of 40."""
    from transformers import AutoConfig, AutoModel

    config = flat_qwen(
        "qwen2_vl",
        text={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 8960,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision={
            "depth": 2,
            "embed_dim": VISION_HIDDEN,
            "hidden_size": HIDDEN,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
        },
        tokens={
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 31,
            "vision_start_token_id": 32,
            "vision_end_token_id": 33,
        },
        rope={"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    write_published(folder, config, model.state_dict())


def image_and_text(num_patches_side: int, num_text: int) -> ModelInputs:
    """One row: an image of side x side patches, then text, then the prompts."""
    num_image = num_patches_side**2 // 4
    prompts = list(range(VOCABULARY, VOCABULARY + PROMPTS.num_tokens))
    input_ids = torch.tensor([[IMAGE_TOKEN] * num_image + [1] * num_text + prompts])
    return {
        "input_ids": input_ids,
        "prompt_start_B": torch.tensor([num_image + num_text]),
        **QwenVL(name="qwen2_vl", blank_image_size=28, merge_size=2).index(
            input_ids == IMAGE_TOKEN,
            {
                "pixel_values": torch.randn(num_patches_side**2, 3 * 2 * 14 * 14),
                "image_grid_thw": torch.tensor([[1, num_patches_side, num_patches_side]]),
            },
            [0],
        ),
    }


@contextmanager
def kept_bytes(engine: Engine) -> Iterator[Counter[str]]:
    """Bytes that the backward pass will read, but for parameters: the vision tower's and the others."""
    kept: Counter[str] = Counter()
    seen: set[int] = set()
    part = ["language"]

    def pack(tensor: Tensor) -> Tensor:
        weights = {parameter.untyped_storage().data_ptr() for parameter in engine.model.parameters()}
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | seen:
            seen.add(storage.data_ptr())
            kept[part[0]] += storage.nbytes()
        return tensor

    tower, *_ = tower_modules(engine)
    hooks = [
        tower.register_forward_pre_hook(lambda *_: part.__setitem__(0, "vision")),
        tower.register_forward_hook(lambda *_: part.__setitem__(0, "language")),
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    for hook in hooks:
        hook.remove()


def kept_widths(folder: Path) -> list[tuple[float, float]]:
    """For each case: float32 hidden widths that are kept per token, and vision widths per patch."""
    start_process_group(dist.get_rank())
    inputs = image_and_text(16, 120)
    num_tokens, num_patches = inputs["input_ids"].numel(), len(inputs["pixel_values"])
    found = []
    for training, checkpointing in MEMORY_CASES:
        engine = engine_of(folder, 1, TRAINING[training], checkpointing)
        with kept_bytes(engine) as kept:
            engine.encode(inputs)
        language, vision = kept["language"] / num_tokens, kept["vision"] / num_patches
        found.append((language / (4 * HIDDEN), vision / (4 * VISION_HIDDEN)))
    return found


def test_checkpointing_keeps_four_hidden_widths_per_token_at_most(tmp_path: Path) -> None:
    """2 layers at Qwen2-VL-2B's widths. Without checkpointing LoRA keeps 61, full tuning 66, and 51 of the
    vision tower's per patch."""
    qwen2_vl_2b_of_two_layers(tmp_path)
    found = dict(zip(MEMORY_CASES, run_ranks(kept_widths, tmp_path, world_size=1)[0], strict=True))
    for (training, checkpointing), (language, vision) in found.items():
        case = f"{training}, checkpointing {checkpointing}: {language:.1f} per token, {vision:.1f} per patch"
        # on: the inputs of both layers, input and output of the last norm; 0.02 more of ids and prompts
        assert (round(language, 1) <= 4) == checkpointing, case
        if training == "lora":
            assert vision == 0, case
        else:  # the pixels, the inputs of both blocks, and four of the merger, which is recomputed nowhere
            assert round(vision, 1) <= 7, case
