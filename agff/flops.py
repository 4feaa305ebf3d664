"""Floating-point operations of a step by formula: from the sizes of its chunks and the model's configuration.

Counted are matrix products and attention, a multiplication and an addition as two, as
`torch.utils.flop_counter` counts them. Not counted are element-wise work, look-ups, the rotary tables, the
loss (its three products are about 1e-5 of a step at Qwen2-VL-2B's widths and 1,024 pairs) and an objective's
head (at most 5 % of a step of our recipes; tests/benchmarks/recipe_heads.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from agff.backbone import BackboneConfig
from agff.batch import Batch, ModelInputs
from agff.joined import groups_of
from agff.layer_flops import ATTENTIONS, NEEDED_ATTENTION, Attention, Block, Flops, Linear
from agff.pooled_rows import CAPTION_LENGTH
from agff.prompts import PromptConfig
from agff.shared_images import IMAGE_IDS
from agff.vision_flops import VISION_FLOPS, Image, VisionFlops, num_patches


@dataclass(frozen=True, kw_only=True)
class ChunkShape:
    """What a chunk costs depends on this alone."""

    num_rows: int
    padded_length: int
    """Tokens of each row as it is computed."""
    lengths: tuple[int, ...]
    """Real tokens of each row, soft tokens included; none in a filler."""
    images: tuple[Image, ...]
    """The different images of the chunk; none in training on texts alone."""
    image_ids: tuple[int, ...]
    """Of each: equal ids mean equal images, also in other chunks."""
    has_real_images: bool
    """False where the only image is the blank one that a chunk of texts carries."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Of one step on this rank.

    Model FLOPs utilisation is `useful` / (time x peak), hardware FLOPs utilisation `executed` / (time x peak)
    (Chowdhery et al., PaLM, 2022, section 4.1 and appendix B).
    """

    vision_forward: int
    """F_v: one forward of the vision tower, and of what follows it, over the different real images."""
    language_forward: int
    """F_l: one forward of the language model without adapters over the real tokens; causal half of the
    square."""
    useful: int
    """Forward and backward once, over real tokens and different images: no recompute, no second pass, no
    padding, no blank image; causal half."""
    needed: int
    """`useful`, and the second forward of two passes for what trains or lies behind what trains: about
    F_v + 3 F_l with a frozen tower and LoRA, 4 (F_v + F_l) with everything trained."""
    executed: int
    """What the device computes."""
    num_patches: int
    """Of the different real images."""
    num_tokens: int
    """Real ones."""
    num_padded_tokens: int
    """As they are computed, padding included."""


@dataclass(frozen=True, kw_only=True)
class LanguageFlops:
    """The language model's decoder layers, all alike."""

    block: Block
    num_layers: int

    @classmethod
    def of_config(cls, model_config: Any, backbone: BackboneConfig, attention: Attention) -> Self:
        """From a transformers configuration.

        The soft tokens train, so the gradient passes through every layer, the first included.
        """
        text = model_config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
        hidden, inner = text.hidden_size, text.intermediate_size
        is_lora = backbone.lora is not None
        sizes = (
            (hidden, queries),
            (hidden, keys),
            (hidden, keys),
            (queries, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        )
        return cls(
            block=Block(
                linears=tuple(
                    Linear(
                        inputs=inputs,
                        outputs=outputs,
                        trains=not is_lora,
                        lora_rank=backbone.lora.rank if backbone.lora else 0,
                    )
                    for inputs, outputs in sizes
                ),
                attention_width=queries,
                attention=attention,
                checkpointed=bool(backbone.gradient_checkpointing),
            ),
            num_layers=text.num_hidden_layers,
        )

    def flops(self, lengths: Sequence[int]) -> Flops:
        """Of rows of these lengths."""
        pairs = sum(self.block.attention.pairs(length) for length in lengths)
        return self.block.flops(sum(lengths), pairs) * self.num_layers


@dataclass(frozen=True, kw_only=True)
class _Parts:
    vision: VisionFlops
    language: LanguageFlops

    @classmethod
    def of_config(cls, model_config: Any, backbone: BackboneConfig, attention: Attention) -> Self:
        return cls(
            vision=VISION_FLOPS[model_config.model_type].of_config(model_config, backbone, attention),
            language=LanguageFlops.of_config(model_config, backbone, attention),
        )

    def flops(self, images: Sequence[Image], lengths: Sequence[int]) -> tuple[Flops, Flops, Flops]:
        """Of tower, projector, language model."""
        return self.vision.tower(images), self.vision.projector(images), self.language.flops(lengths)


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """What each chunk of a model costs."""

    run: _Parts
    """As the device computes it."""
    needed: _Parts
    """As the mathematics needs it."""
    plain: LanguageFlops
    """Without adapters."""
    num_soft_tokens: int
    image_token_id: int
    first_pass_chunks: int
    """Chunks that the first pass encodes at once."""
    keeps_vision: bool
    """Whether a frozen tower runs once for each different image of a step and both passes use its output."""

    @classmethod
    def of_config(
        cls,
        model_config: Any,
        backbone: BackboneConfig,
        prompts: PromptConfig,
        *,
        keeps_vision: bool,
        first_pass_chunks: int,
        attention: Attention | None = None,
    ) -> Self:
        """From a transformers configuration; no weights are needed.

        attention: None for that of `backbone.attention`.
        """
        needs = replace(backbone, gradient_checkpointing=False)
        plain = replace(needs, lora=None, text_only=False)
        is_frozen = backbone.lora is not None or backbone.freeze_vision
        return cls(
            run=_Parts.of_config(model_config, backbone, attention or ATTENTIONS[backbone.attention]),
            needed=_Parts.of_config(model_config, needs, NEEDED_ATTENTION),
            plain=LanguageFlops.of_config(model_config, plain, NEEDED_ATTENTION),
            num_soft_tokens=prompts.num_tokens,
            image_token_id=model_config.image_token_id,
            first_pass_chunks=first_pass_chunks,
            keeps_vision=keeps_vision and is_frozen,
        )

    def shape(self, chunk: ModelInputs, *, is_filler: bool = False) -> ChunkShape:
        """Of a chunk on the CPU, where no device is waited for."""
        length_B = chunk["prompt_start_B"] + self.num_soft_tokens
        input_ids = chunk["input_ids"]
        is_real = torch.arange(input_ids.shape[1]) < length_B[:, None]
        image_ids = tuple(chunk[IMAGE_IDS].tolist())
        return ChunkShape(
            num_rows=input_ids.shape[0],
            padded_length=input_ids.shape[1],
            lengths=() if is_filler else tuple((length_B + chunk.get(CAPTION_LENGTH, 0)).tolist()),
            images=self.run.vision.images(chunk) if image_ids else (),
            image_ids=image_ids,
            has_real_images=not is_filler and bool((is_real & (input_ids == self.image_token_id)).any()),
        )

    def pass_1(self, shape: ChunkShape) -> int:
        """Forward without a graph."""
        return sum(part.forward for part in self._executed(shape))

    def pass_2(self, shape: ChunkShape) -> int:
        """Forward, backward, and what checkpointing computes again."""
        return sum(part.forward + part.backward + part.recomputed for part in self._executed(shape))

    def step(self, shapes: Sequence[ChunkShape]) -> StepFlops:
        """Of the chunks of one rank in their order: two passes, of which the first chunk needs only the
        second."""
        lengths = [length for shape in shapes for length in shape.lengths]
        images = _different_images([shape for shape in shapes if shape.has_real_images])
        parts = self.needed.flops(images, lengths)
        useful = sum(part.forward + part.backward for part in parts)
        others = shapes[1:]
        groups = groups_of([(each.num_rows, each.padded_length) for each in others], self.first_pass_chunks)
        executed = sum(self.pass_1(_joined(others[group])) for group in groups)
        executed += sum(map(self.pass_2, shapes))
        if self.keeps_vision and len(shapes) > 1:
            towers = [self.run.vision.tower(shape.images).forward for shape in shapes]
            once = self.run.vision.tower(_different_images(shapes)).forward
            executed += once - sum(towers[1:]) - sum(towers)
        return StepFlops(
            vision_forward=parts[0].forward + parts[1].forward,
            language_forward=self.plain.flops(lengths).forward,
            useful=useful,
            needed=useful + sum(part.forward for part in parts if part.backward),
            executed=executed,
            num_patches=num_patches(images),
            num_tokens=sum(lengths),
            num_padded_tokens=sum(shape.num_rows * shape.padded_length for shape in shapes),
        )

    def of_batch(self, batch: Batch) -> StepFlops:
        """Of a batch whose chunks are on the CPU, fillers included (`Batch.padded_to`)."""
        num_own = len(batch.chunks) - batch.num_fillers
        return self.step(
            [self.shape(chunk, is_filler=index >= num_own) for index, chunk in enumerate(batch.chunks)]
        )

    def _executed(self, shape: ChunkShape) -> tuple[Flops, Flops, Flops]:
        return self.run.flops(shape.images, [shape.padded_length] * shape.num_rows)


def _joined(shapes: Sequence[ChunkShape]) -> ChunkShape:
    """Several chunks as one (agff/joined.py)."""
    return ChunkShape(
        num_rows=sum(shape.num_rows for shape in shapes),
        padded_length=max(shape.padded_length for shape in shapes),
        lengths=tuple(length for shape in shapes for length in shape.lengths),
        images=tuple(image for shape in shapes for image in shape.images),
        image_ids=tuple(content_id for shape in shapes for content_id in shape.image_ids),
        has_real_images=any(shape.has_real_images for shape in shapes),
    )


def _different_images(shapes: Sequence[ChunkShape]) -> list[Image]:
    images: dict[int, Image] = {}
    for shape in shapes:
        images.update(zip(shape.image_ids, shape.images, strict=True))
    return list(images.values())
