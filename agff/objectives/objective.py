"""What an objective is: named tensors of a step's items in, one loss out; perhaps a head that makes more
tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from agff.batch import Batch, Encoded, Item, ModelInputs
from agff.regions import ImageCells
from agff.similarity import FusionConfig


class Head(nn.Module):
    """What an objective reads from the backbone's states beside the embeddings. It trains with the model.

    Under ZeRO it is a module like any other: all its parameters take part in every chunk on every rank, so
    where nothing is eligible its output must still depend on them, times zero.
    """

    num_states: int = 1
    """How many of the backbone's last hidden states it reads."""

    is_random: ClassVar[bool] = False
    """Draws random numbers beside those of dropout modules, as masks. Both passes then draw the same."""

    is_released: ClassVar[bool] = False
    """Part of the model and of its release: its "embedding", (B, M, D) unit vectors, takes the place of that
    of the prompts' states. Any other head serves the training alone, and is dropped by the conversion."""

    image_cells: ImageCells | None = None
    """How it pools the images, where it does: then `with_image_tokens` makes what the language model reads of
    them, and the processor counts by it."""

    def load_from(self, backbone: Path, backbone_config: Any) -> None:
        """Fill in what comes from the backbone's folder, before the training begins. Raises ConfigError where
        it is not there."""

    def with_image_tokens(self, inputs: ModelInputs, maps: Sequence[Tensor]) -> ModelInputs:
        """The inputs with IMAGE_TOKENS (agff/vision.py), and what `forward` is to know of the images.

        maps: (height, width, H) of each different image of the chunk."""
        raise NotImplementedError

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        """Further named tensors of each row of the chunk; "embedding" is already there.

        states: the last `num_states` hidden states (B, T, H), the last layer's at the end, which alone is
        behind the final norm, in the number format of the weights. embedding_BMD is float32 or better, and
        outputs become so: normalise in float32. A learned temperature, or whatever a row does not decide, is
        expanded to (B,): parameters used outside of a forward get no gradient under ZeRO.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ObjectiveResult:
    """What an objective makes of the local rows."""

    loss: Tensor
    """Differentiable scalar; the ranks' mean is the loss of the global batch."""
    metrics: Mapping[str, Tensor]
    """Scalars without gradient, by their names in the log; the same names on every rank and at every step."""
    pair_loss_B: Tensor
    """Loss of each local pair, without gradient: names the worst pairs of a loss spike."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Settings of a loss, the recipe's section `loss`, and the loss itself. A subclass and a row of
    `agff.objectives.OBJECTIVES` is a new one."""

    needs_vectors: ClassVar[bool] = False
    """Compares with a teacher's vectors (data.vectors): pair_data["query_teacher"], ["target_teacher"]."""

    def check(self, source_names: Sequence[str]) -> None:  # noqa: B027 (most fit any data)
        """Raise ConfigError for settings that do not fit the data; before the first step."""

    def check_sizes(self, *, global_batch_size: int, num_fine: int) -> None:  # noqa: B027
        """Raise ConfigError for settings that do not fit the batch, or an item's number of fine vectors;
        before the first step."""

    def check_backbone(self, backbone_config: Any) -> None:  # noqa: B027
        """Raise ConfigError for settings that do not fit the backbone; before the first step."""

    def items_of_pair(self, source: str, query: Item, target: Item) -> tuple[Item, Item]:
        """The items to encode for a pair of that source. Called in a worker of the loader."""
        return query, target

    def pair_data_of(self, source: str, query: Item, target: Item) -> Mapping[str, float]:
        """Of a pair of that source: becomes `batch.pair_data`, by name, the same names for every pair. Called
        in a worker of the loader, with the items as the shards have them."""
        return {}

    @property
    def image_cells(self) -> ImageCells | None:
        """How its head pools the images, where it does."""
        return None

    def build_head(self, backbone_config: Any) -> Head | None:
        """What must be read from the backbone beside the embeddings; None: nothing."""
        return None

    @abstractmethod
    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        """Loss of this rank's rows: B queries, B targets, N explicit negatives, each by name.

        fusion: how the model compares two items. Collective: every rank must call it, with the same B and N.
        Means over local rows need no world-size factor, since gradients are averaged over ranks
        (`all_gather_rows`); means over the eligible rows of all ranks are `weighted_mean_over_all_rows`.
        """
