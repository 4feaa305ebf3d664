"""Floating-point operations of the vision towers by formula, from the patches of each image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from agff.backbone import BackboneConfig
from agff.batch import ModelInputs
from agff.layer_flops import Attention, Block, Flops, Linear

Grid = tuple[int, int, int]
"""Frames, rows and columns in patches."""
Image = tuple[Grid, ...]
"""What the tower sees of an image: itself, or the views of LLaVA-OneVision."""


@dataclass(frozen=True, kw_only=True)
class VisionFlops(ABC):
    """The tower and what carries its output into the language model."""

    patch: Linear
    blocks: tuple[Block, ...]

    @classmethod
    @abstractmethod
    def of_config(cls, model_config: Any, backbone: BackboneConfig, attention: Attention) -> Self:
        """From a transformers configuration."""

    @abstractmethod
    def images(self, chunk: ModelInputs) -> tuple[Image, ...]:
        """The images of a chunk on the CPU."""

    @abstractmethod
    def tower(self, images: Sequence[Image]) -> Flops:
        """Of the module that backbone.freeze_vision freezes."""

    def projector(self, images: Sequence[Image]) -> Flops:
        """Of what follows that module, up to the language model."""
        return Flops()


def num_patches(images: Sequence[Image]) -> int:
    """Patches of all images."""
    return sum(frames * rows * columns for grids in images for frames, rows, columns in grids)


def _image_pairs(images: Sequence[Image]) -> int:
    """Every patch sees all of its frame."""
    return sum(frames * (rows * columns) ** 2 for grids in images for frames, rows, columns in grids)


@dataclass(frozen=True, kw_only=True)
class QwenVisionFlops(VisionFlops):
    """Qwen2-VL, Qwen2.5-VL with its windows, Qwen3-VL with a merger for each deep-stack level."""

    mergers: tuple[Linear, ...]
    merge_size: int
    windowed_blocks: frozenset[int] = frozenset()
    window_side: int = 1
    """Of a window in merged patches."""

    @classmethod
    def of_config(cls, model_config: Any, backbone: BackboneConfig, attention: Attention) -> Self:
        """See VisionFlops."""
        vision, kind = model_config.vision_config, model_config.model_type
        trains = backbone.lora is None and not backbone.freeze_vision
        merge = vision.spatial_merge_size
        if kind == "qwen2_vl":
            width, inner, out = vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.hidden_size
        else:
            width, inner, out = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
        full = set(range(vision.depth)) if kind != "qwen2_5_vl" else set(vision.fullatt_block_indexes)
        levels = len(vision.deepstack_visual_indexes) if kind == "qwen3_vl" else 0
        num_gates = 1 if kind == "qwen2_5_vl" else 0
        merged = width * merge**2
        return cls(
            patch=Linear(
                inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
                outputs=width,
                trains=trains,
                passes_gradient=False,
            ),
            blocks=(_vision_block(width, inner, attention, backbone, trains=trains, num_gates=num_gates),)
            * vision.depth,
            mergers=(
                Linear(inputs=merged, outputs=merged, trains=trains, passes_gradient=trains),
                Linear(inputs=merged, outputs=out, trains=trains, passes_gradient=trains),
            )
            * (1 + levels),
            merge_size=merge,
            windowed_blocks=frozenset(range(vision.depth)) - full,
            window_side=vision.window_size // merge // vision.patch_size if kind == "qwen2_5_vl" else 1,
        )

    def images(self, chunk: ModelInputs) -> tuple[Image, ...]:
        """See VisionFlops."""
        return tuple(((frames, rows, columns),) for frames, rows, columns in chunk["image_grid_thw"].tolist())

    def tower(self, images: Sequence[Image]) -> Flops:
        """See VisionFlops."""
        patches, pairs = num_patches(images), _image_pairs(images)
        window_pairs = sum(
            frames * self._squares(rows) * self._squares(columns)
            for grids in images
            for frames, rows, columns in grids
        )
        flops = self.patch.flops(patches)
        for index, block in enumerate(self.blocks):
            flops += block.flops(patches, window_pairs if index in self.windowed_blocks else pairs)
        return sum((merger.flops(patches // self.merge_size**2) for merger in self.mergers), flops)

    def _squares(self, patches: int) -> int:
        """Sum of the squared lengths that windows cut one side of an image into, in patches."""
        whole, rest = divmod(patches // self.merge_size, self.window_side)
        return (whole * self.window_side**2 + rest**2) * self.merge_size**2


@dataclass(frozen=True, kw_only=True)
class PoolingHead:
    """SigLIP's: one learned query attends to each view, then an MLP.

    transformers runs it where the configuration has vision_use_head, and nothing reads its output, so it has
    no backward. The published LLaVA-OneVision models have it false; SiglipVisionConfig's default is true.
    """

    width: int
    inner: int

    def flops(self, images: Sequence[Image]) -> Flops:
        """Keys and values of each patch; query, output and MLP of each view."""
        views, patches = sum(map(len, images)), num_patches(images)
        of_patches = patches * (2 * self.width**2 + 2 * self.width)  # projections, then scores and weighting
        of_views = views * (2 * self.width**2 + 2 * self.width * self.inner)
        return Flops(forward=2 * (of_patches + of_views))


@dataclass(frozen=True, kw_only=True)
class LlavaVisionFlops(VisionFlops):
    """SigLIP on each view (the whole image and its crops), then a projector of two layers."""

    head: PoolingHead | None
    projector_linears: tuple[Linear, ...]
    side: int
    """Of a view in patches."""
    view_size: int
    pinpoints: list[list[int]]

    @classmethod
    def of_config(cls, model_config: Any, backbone: BackboneConfig, attention: Attention) -> Self:
        """See VisionFlops."""
        vision, layers = model_config.vision_config, model_config.vision_feature_layer
        trains = backbone.lora is None and not backbone.freeze_vision
        projector_trains = backbone.lora is None
        layers = [layers] if isinstance(layers, int) else layers
        num_states = vision.num_hidden_layers + 1
        last_read = max(layer % num_states for layer in layers)
        block = _vision_block(
            vision.hidden_size, vision.intermediate_size, attention, backbone, trains=trains, num_gates=0
        )
        unread = replace(block, has_backward=False)
        width = model_config.get_text_config().hidden_size
        return cls(
            patch=Linear(
                inputs=vision.num_channels * vision.patch_size**2,
                outputs=vision.hidden_size,
                trains=trains,
                passes_gradient=False,
            ),
            blocks=(block,) * last_read + (unread,) * (vision.num_hidden_layers - last_read),
            head=PoolingHead(width=vision.hidden_size, inner=vision.intermediate_size)
            if vision.vision_use_head
            else None,
            projector_linears=(
                Linear(
                    inputs=vision.hidden_size * len(layers),
                    outputs=width,
                    trains=projector_trains,
                    passes_gradient=trains,
                ),
                Linear(
                    inputs=width,
                    outputs=width,
                    trains=projector_trains,
                    passes_gradient=projector_trains,
                ),
            ),
            side=vision.image_size // vision.patch_size,
            view_size=vision.image_size,
            pinpoints=model_config.image_grid_pinpoints,
        )

    def images(self, chunk: ModelInputs) -> tuple[Image, ...]:
        """See VisionFlops."""
        sizes = chunk["image_sizes"].tolist()
        if len(chunk["pixel_values"]) == len(sizes):  # base views alone (`VisionTower.maps`)
            return (((1, self.side, self.side),),) * len(sizes)
        return tuple(self.image(*size) for size in sizes)

    def image(self, height: int, width: int) -> Image:
        """The views of an image of this size in pixels."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        num_views = image_size_to_num_patches((height, width), self.pinpoints, self.view_size)
        return ((1, self.side, self.side),) * num_views

    def tower(self, images: Sequence[Image]) -> Flops:
        """See VisionFlops."""
        patches, pairs = num_patches(images), _image_pairs(images)
        flops = sum((block.flops(patches, pairs) for block in self.blocks), self.patch.flops(patches))
        return flops if self.head is None else flops + self.head.flops(images)

    def projector(self, images: Sequence[Image]) -> Flops:
        """See VisionFlops."""
        return sum((linear.flops(num_patches(images)) for linear in self.projector_linears), Flops())


def _vision_block(
    width: int, inner: int, attention: Attention, backbone: BackboneConfig, *, trains: bool, num_gates: int
) -> Block:
    """Queries, keys and values, output, then an MLP with `num_gates` gates."""

    def linear(inputs: int, outputs: int) -> Linear:
        return Linear(inputs=inputs, outputs=outputs, trains=trains)

    return Block(
        linears=(
            linear(width, 3 * width),
            linear(width, width),
            *((linear(width, inner),) * (1 + num_gates)),
            linear(inner, width),
        ),
        attention_width=width,
        attention=attention,
        has_backward=trains,
        checkpointed=bool(backbone.gradient_checkpointing),
    )


VISION_FLOPS: dict[str, type[VisionFlops]] = {
    "qwen2_vl": QwenVisionFlops,
    "qwen2_5_vl": QwenVisionFlops,
    "qwen3_vl": QwenVisionFlops,
    "llava_onevision": LlavaVisionFlops,
}
"""By transformers' model type."""
