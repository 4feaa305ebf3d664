"""The vision tower's output as a value: computed once, expanded where rows share an image, given back to the
backbone.

The keys of ModelInputs that are read here come from `agff.processor`, but for IMAGE_FEATURES, which takes the
place of the pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agff.batch import ModelInputs, take_rows
from agff.families import FAMILIES, LlavaOneVision, QwenVL, family_of
from agff.shared_images import FEATURE_ROWS, IMAGE_FEATURES

VISION_OUTPUT = "mm_encoder_outputs"
"""Argument of every backbone's forward."""
IMAGE_TOKENS = "image_tokens"
"""(image tokens of all rows, H): what a head that pools images has made of the tower's output."""


class VisionTower(ABC):
    """A backbone's vision tower, apart from the rest. Holds no state but the model."""

    sizes: ClassVar[str]
    """Input with a row for each image, its size; the tower and what comes behind it read it."""

    behind: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of the backbone's parameters outside of it that only images reach."""

    def __init__(self, model: Any, family: Any) -> None:
        """model: the backbone without adapters around it."""
        self.model, self.family = model, family
        self.module: nn.Module = model.get_submodule(family.vision_tower)

    @property
    def is_frozen(self) -> bool:
        """Nothing in it trains and nothing in it is random, so its output is the same in both passes."""
        return not any(parameter.requires_grad for parameter in self.module.parameters()) and not any(
            module.training for module in self.module.modules()
        )

    @abstractmethod
    def encode(self, arguments: dict[str, Any]) -> Tensor:
        """(rows of all images, ...) output of the tower for `Family.tower_arguments` of a chunk.

        Under ZeRO-3 the tower is gathered: a collective."""

    @abstractmethod
    def num_rows(self, inputs: ModelInputs) -> list[int]:
        """How many rows of `encode` belong to each image."""

    @abstractmethod
    def select(self, inputs: ModelInputs, images: Sequence[int]) -> ModelInputs:
        """The tower's inputs for these images of a chunk alone."""

    @abstractmethod
    def maps(self, inputs: ModelInputs) -> list[Tensor]:
        """(height, width, H) of each image, as wide as the language model, from inputs with IMAGE_FEATURES:
        what a head pools (`Family.map_sizes`). Trained parameters between tower and language model are
        gathered."""

    @abstractmethod
    def backbone_output(self, inputs: ModelInputs) -> Any:
        """What the backbone takes for the chunk's images in place of pixels."""

    def image_inputs(self, inputs: ModelInputs) -> ModelInputs:
        """What of the inputs the tower reads: pixels, sizes, and what the loader has computed from them."""
        return {name: inputs[name] for name in self.family.tower_inputs if name in inputs}

    def with_features(self, inputs: ModelInputs, features: Tensor) -> dict[str, Tensor]:
        """The inputs with the tower's output in place of what only the tower reads."""
        dropped = self.image_inputs(inputs).keys() - {self.sizes}
        kept = {name: tensor for name, tensor in inputs.items() if name not in dropped}
        return {**kept, IMAGE_FEATURES: features}

    def backbone_inputs(self, inputs: ModelInputs) -> dict[str, Any]:
        """Keyword arguments of the backbone's forward from inputs with IMAGE_FEATURES, or with IMAGE_TOKENS,
        which win, or without any image."""
        arguments = self.family.language_arguments(inputs)
        given = inputs.get(IMAGE_TOKENS)
        if given is None and IMAGE_FEATURES not in inputs:
            return arguments
        output = self.backbone_output(inputs) if given is None else VisionOutput(pooler_output=[given])
        return {**arguments, VISION_OUTPUT: {"image": output}}


@dataclass(frozen=True, kw_only=True)
class VisionOutput:
    """What the backbones read of their tower's output; each list holds parts to be joined."""

    pooler_output: list[Tensor]
    deepstack_features: list[list[Tensor]] = field(default_factory=list)
    """Read by Qwen3-VL."""


class QwenTower(VisionTower):
    """Features are (image tokens, levels, H): behind the merger, then Qwen3-VL's deep-stack levels."""

    sizes = "image_grid_thw"

    def encode(self, arguments: dict[str, Any]) -> Tensor:
        """See VisionTower."""
        named = {name.removeprefix("image_"): value for name, value in arguments.items()}
        output = self.module(named.pop("pixel_values"), **named)
        return torch.stack([output.pooler_output, *(getattr(output, "deepstack_features", None) or ())], 1)

    def num_rows(self, inputs: ModelInputs) -> list[int]:
        """See VisionTower."""
        return self.family.num_image_tokens(inputs)

    def select(self, inputs: ModelInputs, images: Sequence[int]) -> ModelInputs:
        """See VisionTower."""
        grid = inputs["image_grid_thw"]
        parts = inputs["pixel_values"].split(grid.prod(dim=1).tolist())
        pixels = torch.cat([parts[image] for image in images])
        return self.family.index_patches({"pixel_values": pixels, "image_grid_thw": grid[list(images)]})

    def maps(self, inputs: ModelInputs) -> list[Tensor]:
        """See VisionTower. The first level alone."""
        parts = inputs[IMAGE_FEATURES][:, 0].split(self.num_rows(inputs))
        sizes = self.family.map_sizes(inputs)
        return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]

    def backbone_output(self, inputs: ModelInputs) -> VisionOutput:
        """See VisionTower."""
        features = inputs[IMAGE_FEATURES]
        if FEATURE_ROWS in inputs:
            features = take_rows(features, inputs[FEATURE_ROWS])
        level, *deeper = features.unbind(dim=1)
        return VisionOutput(pooler_output=[level], deepstack_features=[[other] for other in deeper])


class LlavaTower(VisionTower):
    """Features are (views, patches, H), before the projector, which trains with the language model."""

    sizes = "image_sizes"
    behind = ("multi_modal_projector.", "image_newline")

    def encode(self, arguments: dict[str, Any]) -> Tensor:
        """See VisionTower."""
        layer = self.model.config.vision_feature_layer
        output = self.module(arguments["pixel_values"], output_hidden_states=layer, return_dict=True)
        states = output.hidden_states
        features = states[layer] if isinstance(layer, int) else torch.cat([states[n] for n in layer], dim=-1)
        has_class_token = self.model.config.vision_feature_select_strategy == "default"
        return features[:, 1:] if has_class_token else features

    def num_rows(self, inputs: ModelInputs) -> list[int]:
        """See VisionTower."""
        from transformers.models.llava_onevision import modeling_llava_onevision as llava

        config = self.model.config
        side = config.vision_config.image_size
        sizes = inputs["image_sizes"].tolist()
        if _views(inputs).shape[0] == len(sizes):  # base views alone; with crops there are two or more
            return [1] * len(sizes)
        return [llava.image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]

    def select(self, inputs: ModelInputs, images: Sequence[int]) -> ModelInputs:
        """See VisionTower."""
        parts = inputs["pixel_values"].split(self.num_rows(inputs))
        pixels = torch.cat([parts[image] for image in images])
        return {"pixel_values": pixels, "image_sizes": inputs["image_sizes"][list(images)]}

    def maps(self, inputs: ModelInputs) -> list[Tensor]:
        """See VisionTower. Of the base views."""
        projected_VPH = self.model.multi_modal_projector(inputs[IMAGE_FEATURES])
        sizes = self.family.map_sizes(inputs)
        return [view.unflatten(0, size) for view, size in zip(projected_VPH, sizes, strict=True)]

    def backbone_output(self, inputs: ModelInputs) -> _Projected:
        """See VisionTower."""
        return _Projected(self, inputs)


def _views(inputs: ModelInputs) -> Tensor:
    return inputs[IMAGE_FEATURES] if IMAGE_FEATURES in inputs else inputs["pixel_values"]


@dataclass(frozen=True)
class _Projected:
    """The tower's output behind projector and newlines, at the moment the backbone asks for it: inside its
    forward, where ZeRO-3 has gathered its own parameter, the newline."""

    tower: LlavaTower
    inputs: ModelInputs

    @property
    def pooler_output(self) -> list[Tensor]:
        model, inputs = self.tower.model, self.inputs
        projected = model.multi_modal_projector(inputs[IMAGE_FEATURES])
        packed, _ = model.pack_image_features(
            projected.split(self.tower.num_rows(inputs)),
            inputs["image_sizes"],
            image_newline=model.image_newline,
            vision_aspect_ratio=model.config.vision_aspect_ratio,
        )
        if FEATURE_ROWS not in inputs:
            return packed
        return [take_rows(torch.cat(packed), inputs[FEATURE_ROWS])]


TOWERS: Mapping[type, type[VisionTower]] = {QwenVL: QwenTower, LlavaOneVision: LlavaTower}
"""By the class in FAMILIES."""


def tower_of(backbone: Any) -> VisionTower:
    """The vision tower of a backbone, with or without adapters around it. Raises ConfigError for a family
    that is not known."""
    model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    family = family_of(model.config)
    return TOWERS[FAMILIES[family.name]](model, family)
