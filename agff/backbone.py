"""Loading and preparing the multimodal language model of a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from agff import vision_attention
from agff.backbone_folder import check_backbone_folder, lazy_tensors
from agff.errors import ConfigError
from agff.families import family_of
from agff.lazy_tensor import LazyTensor
from agff.patch_projection import project_patches_by_product
from agff.vision import VISION_OUTPUT, tower_of


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model's linear layers, instead of full tuning."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                f"backbone.lora.rank={self.rank} must be >= 1; for full tuning leave backbone.lora null"
            )
        if self.alpha < 1:
            raise ConfigError(f"backbone.lora.alpha={self.alpha} must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"backbone.lora.dropout={self.dropout} must be >= 0 and < 1")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which model is trained, and which of its parameters."""

    path: str
    """Folder of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or LLaVA-OneVision model: weights, tokenizer, image
    processor; or a release of ours, of which it is the backbone."""
    lora: LoraConfig | None = None
    """Null: full tuning."""
    freeze_vision: bool = False
    """Leave the vision tower as it is (with full tuning; with lora it always is). LLaVA-OneVision's projector
    is no part of it and trains; the merger of the Qwen families is."""
    text_only: bool = False
    """Train on texts alone: the vision tower, which must be frozen, is never called, nor is a projector
    trained, and a sample with an image cannot be used. The release embeds images all the same."""
    gradient_checkpointing: bool | Literal["auto"] = True
    """Recompute activations in the backward pass: one more forward for far less memory. auto: only where a
    chunk does not fit without (see batch.chunk_size)."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation of transformers."""

    def __post_init__(self) -> None:
        if self.text_only and self.lora is None and not self.freeze_vision:
            raise ConfigError(
                "backbone.text_only=true, but the vision tower trains, and no text would reach it; set "
                "backbone.freeze_vision true, or train with backbone.lora"
            )


def load_backbone(folder: Path, *, dtype: torch.dtype, attention: str) -> Any:
    """The model of a Hugging Face folder without its language-model head, in evaluation mode.

    With an active ZeRO-3 configuration of transformers the parameters are partitioned while loading; then a
    collective. Raises ConfigError when the folder holds no model, or not all of its weights, or those of
    another one, and when this transformers cannot run it as it is run here.
    """
    from transformers import AutoModel

    check_backbone_folder(folder)
    try:
        model, found = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by their names
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"{folder}: cannot load a backbone: {reason}") from None
    except RuntimeError as error:  # under ZeRO-3, on rank 0, which has the weights
        if not (others := re.findall(r"size mismatch for ([^:\s]+):", str(error))):
            raise
        raise ConfigError(_other_shapes(folder, others)) from None
    if others := sorted(name for name, *_ in found["mismatched_keys"]):
        raise ConfigError(_other_shapes(folder, others))
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{folder}: the weights lack {len(missing)} parameters of the model, {', '.join(missing[:3])}; "
            "they would start at random: download the folder again"
        )
    _check_takes_features(model)
    _speed_up_vision(model, attention)
    return model


def empty_backbone(folder: Path, *, dtype: torch.dtype, attention: str) -> Any:
    """As `load_backbone`, but without weights: the parameters are on the meta device, buffers are real. Of
    the folder's weights only the names are read. Raises ConfigError."""
    from transformers import AutoConfig, AutoModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    check_backbone_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with empty_weights():
            model = AutoModel.from_config(config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"{folder}: cannot load a backbone: {reason}") from None
    conversions = get_model_conversion_mapping(model)
    _names_in_model(lazy_tensors(folder), model, conversions, model.state_dict())
    # as from_pretrained leaves it: a model is saved under the names that it was loaded from
    model._weight_conversions = [each for each in conversions if each.was_used()]
    _check_takes_features(model)
    _speed_up_vision(model, attention)
    return model.eval()


def empty_weights() -> Any:
    """A context in which modules are made without memory for their parameters; buffers are real."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def backbone_tensors(folder: Path, model: Any, shells: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """The weights in the folder by the names that they have in the backbone, to be read one by one.

    shells: its weights by these names, without storage. A language-model head, which a backbone goes without,
    is left out. Raises ConfigError when some are missing or of another shape."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    stored = lazy_tensors(folder)
    names = _names_in_model(stored, model, get_model_conversion_mapping(model), shells)
    found = {name: stored[in_file] for in_file, name in names.items()}
    if missing := sorted(shells.keys() - found.keys()):
        raise ConfigError(
            f"{folder}: the weights lack {len(missing)} parameters of the model, {', '.join(missing[:3])}; "
            "download the folder again"
        )
    if others := sorted(name for name in shells if found[name].shape != shells[name].shape):
        raise ConfigError(_other_shapes(folder, others))
    return {name: found[name] for name in shells}


def _names_in_model(
    names: Iterable[str], model: Any, conversions: list[Any], shells: Mapping[str, Tensor]
) -> dict[str, str]:
    """Name in a file -> name in the model, as transformers finds it, which notes what conversions it used."""
    from transformers.core_model_loading import rename_source_key

    prefix, meta = model.base_model_prefix, dict(shells)
    return {name: rename_source_key(name, conversions, [], prefix, meta)[0] for name in names}


def _check_takes_features(model: Any) -> None:
    """A forward that does not know the argument would swallow it with all images, silently."""
    family_of(model.config)
    if VISION_OUTPUT not in signature(type(model).forward).parameters:
        raise ConfigError(
            f"transformers {version('transformers')}: {type(model).__name__} does not take the vision "
            f"tower's output ({VISION_OUTPUT}) and would ignore every image; install the version that "
            "requirements.txt names"
        )


def _speed_up_vision(model: Any, attention: str) -> None:
    """Patches projected by a matrix product; with sdpa, packed images attended to without a loop.

    The parameters and their names stay. The other attentions keep what transformers does: flash_attention_2
    has no loop, eager is the slow reference.
    """
    family = family_of(model.config)
    project_patches_by_product(model)
    tower = getattr(model, family.vision_tower, None)
    if attention == "sdpa" and family.packs_images and tower is not None:
        vision_attention.register()
        tower.config._attn_implementation = vision_attention.IMPLEMENTATION


def _other_shapes(folder: Path, names: Sequence[str]) -> str:
    return (
        f"{folder}: {len(names)} weights have another shape than config.json says, {', '.join(names[:3])}; "
        "they are of another model: download the folder again"
    )


def choose_trainable(backbone: Any, config: BackboneConfig) -> Any:
    """The backbone in training mode with adapters or frozen parts as configured; the soft tokens are added
    later and always train.

    A frozen vision tower stays in evaluation mode: no dropout, so that its output is the same in both passes,
    and nothing is recomputed. With `lora` everything but the adapters is frozen. Raises ConfigError for a
    family that is not known and for a model without its family's vision tower.
    """
    family = family_of(backbone.config)
    model = backbone.train()
    if config.lora is not None:
        import peft

        lora = peft.LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=family.lora_targets,
        )
        # in the backbone's own precision: ZeRO-3 wants one for all
        backbone = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    if config.lora is not None or config.freeze_vision:
        _freeze(model, family.vision_tower)
    if config.text_only:  # without a gradient it would still decay
        for name, parameter in model.named_parameters():
            if name.startswith(tower_of(model).behind):
                parameter.requires_grad_(False)
    if config.gradient_checkpointing:
        _enable_checkpointing(model)
    return backbone


def check_attention(name: str, *, precision: str) -> None:
    """Raises ConfigError when this machine, or the precision, cannot run the attention implementation.

    transformers would find out only while it loads the model, when the other ranks already wait.
    """
    if name != "flash_attention_2":
        return
    from transformers.utils import is_flash_attn_2_available

    setting = f"backbone.attention={name}"
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        raise ConfigError(
            f"{setting}, but the package flash-attn is not installed; "
            "pip install flash-attn --no-build-isolation, or use backbone.attention=sdpa"
        ) from None
    if not is_flash_attn_2_available():
        raise ConfigError(
            f"{setting}, but flash-attn {found} cannot be used here: it needs version 2.3.3 or later and a "
            "GPU that torch sees; use backbone.attention=sdpa"
        )
    if precision == "fp32":
        raise ConfigError(
            f"{setting} computes in bf16 only, but the precision is fp32; use precision=bf16 or "
            "backbone.attention=sdpa"
        )


def _freeze(model: nn.Module, tower: str) -> None:
    frozen = getattr(model, tower, None)
    if frozen is None or next(frozen.parameters(), None) is None:
        raise ConfigError(
            f"{type(model).__name__} has no vision tower {tower!r}, so nothing of it would be frozen; name "
            "the right one in agff/families.py, or set backbone.lora null and backbone.freeze_vision false"
        )
    frozen.requires_grad_(False).eval()


def _enable_checkpointing(model: Any) -> None:
    """Non-reentrant: the reentrant form fails when two forwards precede one backward (ZeRO-3, one chunk).

    It needs no input that requires a gradient, so transformers' hooks, which put one on the output of every
    inner model's first layer, are taken off: a frozen vision tower would keep activations and run backward.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
