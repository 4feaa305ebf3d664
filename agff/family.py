"""What the processor and the training must know of a family of backbones; agff/families.py has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from agff.batch import ModelInputs


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """What the processor and the training must know of a family of backbones."""

    name: str
    """transformers' model type."""
    blank_image_size: int
    """Side in pixels of the blank image that a chunk of texts carries."""

    image_token: ClassVar[str]
    """Is in the text once for each embedding of an image."""
    around_image: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    """Special tokens before and behind an image."""
    image_inputs: ClassVar[tuple[str, ...]]
    """Tensors of the image processor that the backbone takes."""
    tower_inputs: ClassVar[tuple[str, ...]]
    """Tensors of a chunk that only the vision tower reads, but for the images' sizes."""
    has_pixel_limits: ClassVar[bool]
    """Whether processor.min_pixels and processor.max_pixels mean something."""
    vision_tower: ClassVar[str]
    """The backbone's module that backbone.freeze_vision leaves as it is, and that gets no adapters."""
    packs_images: ClassVar[bool]
    """Whether the vision tower gets the patches of all images in one sequence (agff/vision_attention.py)."""
    gathered_whole: ClassVar[tuple[str, ...]]
    """Modules, or lists of them, whose parameters ZeRO-3 gathers at once. Each takes its input by position
    and gives its output to what follows: only then DeepSpeed sees the end of its backward pass."""
    frozen_gathered_whole: ClassVar[tuple[str, ...]] = ()
    """Those of which this is so only where they do not train."""
    lora_layers: ClassVar[tuple[str, ...]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers of the language model that get adapters."""

    @property
    def lora_targets(self) -> str:
        """PEFT's `target_modules`: a pattern for `lora_layers` outside of the vision tower."""
        return rf"(?!{self.vision_tower}\.).*\.({'|'.join(self.lora_layers)})"

    @classmethod
    @abstractmethod
    def of_config(cls, model_config: Any) -> Self:
        """From a transformers configuration."""

    @abstractmethod
    def num_image_tokens(self, pixels: Mapping[str, Tensor]) -> list[int]:
        """Image tokens of each image, from the image processor's tensors."""

    @abstractmethod
    def map_sizes(self, pixels: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """(height, width) of the map that a head may pool each image from (`VisionTower.maps`)."""

    @abstractmethod
    def index(
        self,
        is_image_BT: Tensor,
        pixels: Mapping[str, Tensor],
        image_of_row: Sequence[int],
        *,
        pooled: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor]:
        """In a worker of the loader: `image_inputs`, and where tokens and patches are (agff/processor.py).

        is_image_BT: where the image tokens are. image_of_row: which image each row with one has. pooled: of
        each such row, (rows, columns) of the cells that stand for its image; None: its own tokens do."""

    @abstractmethod
    def tower_arguments(self, inputs: ModelInputs) -> dict[str, Any]:
        """On the device: the backbone's keyword arguments for the images of a chunk, "pixel_values" and
        others that begin with "image_". Reads nothing from the device (agff.batch.HOST_INPUTS).
        """

    def language_arguments(self, inputs: ModelInputs) -> dict[str, Any]:
        """On the device: the backbone's keyword arguments for the tokens of a chunk."""
        return {"input_ids": inputs["input_ids"]}

    @abstractmethod
    def num_tokens_of_size(self, height: int, width: int, image_processor: Any) -> int:
        """Image tokens of an image of that size."""

    @abstractmethod
    def map_size_of(self, height: int, width: int, image_processor: Any) -> tuple[int, int]:
        """`map_sizes` of an image of that size in pixels."""

    @abstractmethod
    def max_image_pixels(self, image_processor: Any) -> int:
        """Pixels of one image that the model sees at most."""

    def stock_processor(self, model_config: Any) -> dict[str, Any]:
        """What transformers' own processor must be given beside tokenizer and image processor: the values of
        its processor_config.json, if it needs one."""
        return {}

    @abstractmethod
    def set_pixel_limits(
        self, image_processor: Any, *, min_pixels: int | None, max_pixels: int | None
    ) -> None:
        """Set the limits that are given. Raises ConfigError for a family that has none."""
