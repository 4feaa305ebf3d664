"""The backbone families: how each spells an image in tokens, where its parts are, what its numbers mean.

A new family is a row of FAMILIES and one of agff/vision_flops.py's VISION_FLOPS. If no class here fits, it is
a class too, with a row of agff/vision.py's TOWERS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from agff.batch import ModelInputs
from agff.errors import ConfigError
from agff.family import Family
from agff.positions import mrope_position_ids, packed_arguments, packed_index, sizes_in_tokens


@dataclass(frozen=True, kw_only=True)
class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: one token per merge x merge patches of an image of any size."""

    merge_size: int
    window_size: int | None = None
    """Side in tokens of the windows that most layers of Qwen2.5-VL's tower attend in."""
    table_size: int | None = None
    """Side of Qwen3-VL's learned table of positions, which is interpolated to the image's size."""

    image_token = "<|image_pad|>"
    around_image = (("<|vision_start|>",), ("<|vision_end|>",))
    image_inputs = ("pixel_values", "image_grid_thw")
    tower_inputs = (
        *image_inputs,
        "image_lengths",
        "image_position_ids",
        "image_interp_indices",
        "image_interp_weights",
        "image_window_index",
        "window_lengths",
    )
    has_pixel_limits = True
    vision_tower = "visual"  # its merger, the projector to the language model, is a part of it
    packs_images = True
    gathered_whole = (
        "language_model.layers",
        "visual.blocks",
        "visual.merger",
        "visual.deepstack_merger_list",  # Qwen3-VL
    )

    @classmethod
    def of_config(cls, model_config: Any) -> Self:
        """See Family."""
        vision = model_config.vision_config
        token_px = vision.patch_size * vision.spatial_merge_size
        window_px = getattr(vision, "window_size", None)
        num_positions = getattr(vision, "num_position_embeddings", None)
        return cls(
            name=model_config.model_type,
            merge_size=vision.spatial_merge_size,
            window_size=window_px and window_px // token_px,
            table_size=num_positions and math.isqrt(num_positions),
            blank_image_size=token_px,
        )

    def num_image_tokens(self, pixels: Mapping[str, Tensor]) -> list[int]:
        """See Family."""
        return (pixels["image_grid_thw"].prod(dim=1) // self.merge_size**2).tolist()

    def map_sizes(self, pixels: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """See Family."""
        return sizes_in_tokens(pixels["image_grid_thw"], self.merge_size)

    def index(
        self,
        is_image_BT: Tensor,
        pixels: Mapping[str, Tensor],
        image_of_row: Sequence[int],
        *,
        pooled: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor]:
        """See Family."""
        sizes = self.map_sizes(pixels)
        position_ids = mrope_position_ids(is_image_BT, pooled or [sizes[image] for image in image_of_row])
        return {"position_ids": position_ids, **self.index_patches(pixels)}

    def index_patches(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of these images alone: `image_inputs`, and where patches are."""
        return {name: pixels[name] for name in self.image_inputs} | packed_index(
            pixels["image_grid_thw"],
            merge_size=self.merge_size,
            window_size=self.window_size,
            table_size=self.table_size,
        )

    def tower_arguments(self, inputs: ModelInputs) -> dict[str, Any]:
        """See Family."""
        own = {name: inputs[name] for name in self.tower_inputs if name in inputs}
        return packed_arguments(own, merge_size=self.merge_size, window_size=self.window_size)

    def language_arguments(self, inputs: ModelInputs) -> dict[str, Any]:
        """See Family."""
        position_ids = inputs["position_ids"].transpose(0, 1)  # the backbone has the rows second
        return {**super().language_arguments(inputs), "position_ids": position_ids}

    def num_tokens_of_size(self, height: int, width: int, image_processor: Any) -> int:
        """See Family."""
        return image_processor.get_number_of_image_patches(height, width, {}) // self.merge_size**2

    def map_size_of(self, height: int, width: int, image_processor: Any) -> tuple[int, int]:
        """See Family."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        side, limits = image_processor.patch_size * image_processor.merge_size, image_processor.size
        resized = smart_resize(
            height, width, side, min_pixels=limits["shortest_edge"], max_pixels=limits["longest_edge"]
        )
        return resized[0] // side, resized[1] // side

    def max_image_pixels(self, image_processor: Any) -> int:
        """See Family."""
        return image_processor.size["longest_edge"]

    def set_pixel_limits(
        self, image_processor: Any, *, min_pixels: int | None, max_pixels: int | None
    ) -> None:
        """See Family."""
        size = dict(image_processor.size)
        size["shortest_edge"] = min_pixels or size["shortest_edge"]
        size["longest_edge"] = max_pixels or size["longest_edge"]
        image_processor.size = size


@dataclass(frozen=True, kw_only=True)
class LlavaOneVision(Family):
    """LLaVA-OneVision: a base view and up to nine crops, unpadded, a newline token behind each row."""

    pinpoints: list[list[int]]
    view_size: int
    patch_size: int
    max_crops: int

    image_token = "<image>"
    around_image = ((), ())
    image_inputs = tower_inputs = ("pixel_values", "image_sizes")
    has_pixel_limits = False
    vision_tower = "vision_tower"  # the projector trains, as in LLaVE
    packs_images = False  # its views are of one size, and a batch
    gathered_whole = ("language_model.layers",)
    frozen_gathered_whole = ("vision_tower.encoder.layers",)  # the last one's output is taken from a hook

    @classmethod
    def of_config(cls, model_config: Any) -> Self:
        """See Family."""
        vision = model_config.vision_config
        return cls(
            name=model_config.model_type,
            blank_image_size=vision.image_size,
            pinpoints=model_config.image_grid_pinpoints,
            view_size=vision.image_size,
            patch_size=vision.patch_size,
            max_crops=int(model_config.vision_aspect_ratio.removeprefix("anyres_max_")),
        )

    def num_image_tokens(self, pixels: Mapping[str, Tensor]) -> list[int]:
        """See Family."""
        return [
            self.num_tokens_of_size(int(height), int(width), None) for height, width in pixels["image_sizes"]
        ]

    def map_sizes(self, pixels: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """See Family. It is that of the base view, whatever the image's size."""
        return [self.map_size_of(0, 0, None)] * len(pixels["image_sizes"])

    def map_size_of(self, height: int, width: int, image_processor: Any) -> tuple[int, int]:
        """See Family."""
        side = self.view_size // self.patch_size
        return side, side

    def index(
        self,
        is_image_BT: Tensor,
        pixels: Mapping[str, Tensor],
        image_of_row: Sequence[int],
        *,
        pooled: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor]:
        """See Family. Positions are the places in the row, which the backbone counts itself. A head pools the
        base view alone, the first one."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        if pooled is not None:
            return {"pixel_values": pixels["pixel_values"][:, 0], "image_sizes": pixels["image_sizes"]}
        views = [
            views_VCHW[: image_size_to_num_patches(size, self.pinpoints, self.view_size)]
            for views_VCHW, size in zip(pixels["pixel_values"], pixels["image_sizes"].tolist(), strict=True)
        ]
        return {"pixel_values": torch.cat(views), "image_sizes": pixels["image_sizes"]}

    def tower_arguments(self, inputs: ModelInputs) -> dict[str, Any]:
        """See Family."""
        return {name: inputs[name] for name in self.image_inputs}

    def num_tokens_of_size(self, height: int, width: int, image_processor: Any) -> int:
        """What the model's own packing leaves of an image, found by packing an image without storage."""
        from transformers.models.llava_onevision import modeling_llava_onevision as model

        size, side = (height, width), self.view_size // self.patch_size
        rows, columns = model.get_anyres_image_grid_shape(size, self.pinpoints, self.view_size)
        packed = model.unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), size)
        height, width = packed.shape[1:]
        ratio = math.sqrt(height * width / (self.max_crops * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
        return side**2 + height * (width + 1)

    def max_image_pixels(self, image_processor: Any) -> int:
        """See Family."""
        return max(height * width for height, width in self.pinpoints)

    def stock_processor(self, model_config: Any) -> dict[str, Any]:
        """See Family."""
        return {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": self.image_token,
            "video_token": "<video>",
            "num_image_tokens": (self.view_size // self.patch_size) ** 2,
            "vision_feature_select_strategy": model_config.vision_feature_select_strategy,
            "vision_aspect_ratio": model_config.vision_aspect_ratio,
        }

    def set_pixel_limits(
        self, image_processor: Any, *, min_pixels: int | None, max_pixels: int | None
    ) -> None:
        """See Family."""
        if min_pixels is not None or max_pixels is not None:
            raise ConfigError(
                "processor.min_pixels and processor.max_pixels have no meaning for llava_onevision, whose "
                "image sizes are the backbone's image_grid_pinpoints; leave them null"
            )


FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": QwenVL,
    "llava_onevision": LlavaOneVision,
}
"""By transformers' model type."""


def family_of(model_config: Any) -> Family:
    """The family of a transformers configuration. Raises ConfigError for a type that is not supported."""
    kind = model_config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"backbone of type {kind!r} is not supported; known are {', '.join(FAMILIES)}")
    return FAMILIES[kind].of_config(model_config)
