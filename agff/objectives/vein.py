"""FAM's adaptation stage, VEIN: the contrastive objective, and visual tokens rebuilt from the others and the
item's embedding, which so must hold what they show.

Only items that are purely visual have them. Source: FAM (AAAI-26, doi 10.1609/aaai.v40i32.39918), its paper
and code; what the two leave open or do otherwise is marked as ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from agff.batch import IMAGE_PLACEHOLDER, Batch, Encoded, Item, ModelInputs
from agff.collectives import weighted_mean_over_all_rows
from agff.errors import ConfigError
from agff.objectives.contrastive import Contrastive
from agff.objectives.mac import tokens_before_prompts
from agff.objectives.objective import Head, ObjectiveResult
from agff.similarity import FusionConfig

NUM_HEADS = 8
POSITION_BASE = 10_000


@dataclass(frozen=True, kw_only=True)
class VisualSources:
    """Sources whose items are purely visual, by the side on which they are."""

    queries: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Vein(Contrastive):
    """The contrastive objective, with all its settings, and the reconstruction of visual tokens.

    A subclass, so that the settings of both are one flat section and a new one of Contrastive is one here.
    """

    reconstruction_weight: float = 1.0
    """Of the mean over all masked tokens of the global batch, beside the contrastive loss; FAM's value."""
    layers: int = 3
    """Last layers whose states are rebuilt, with one decoder; FAM: 3 for 2B, 1 for 7B."""
    mask_ratio: float = 0.25
    """Share of an image's tokens that is masked, at least one of them; FAM: 0.2 to 0.3."""
    decoder_dropout: float = 0.1
    """In the decoder; FAM's value."""
    visual_sources: VisualSources = field(default_factory=VisualSources)
    """Sources whose queries or targets are purely visual. Of these an item counts if it has an image and no
    text beyond its instruction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruction_weight <= 0:
            raise ConfigError(
                f"loss.reconstruction_weight={self.reconstruction_weight} must be > 0; without the "
                "reconstruction use objective: contrastive"
            )
        if self.layers < 1:
            raise ConfigError(f"loss.layers={self.layers} must be >= 1")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"loss.mask_ratio={self.mask_ratio} must be > 0 and < 1")
        if not 0 <= self.decoder_dropout < 1:
            raise ConfigError(f"loss.decoder_dropout={self.decoder_dropout} must be >= 0 and < 1")

    def check(self, source_names: Sequence[str]) -> None:
        """See Objective: sources that do not exist, or none at all."""
        super().check(source_names)
        unknown = [
            f"loss.visual_sources.{side}: {name}"
            for side, names in vars(self.visual_sources).items()
            for name in names
            if name not in source_names
        ]
        if unknown:
            raise ConfigError(
                "no such source in the shards: " + "; ".join(unknown) + f"; there are {_listed(source_names)}"
            )
        if not (self.visual_sources.queries or self.visual_sources.targets):
            raise ConfigError(
                "loss.visual_sources names no source, so nothing would be rebuilt; list those whose "
                "queries or targets are images alone, as {queries: [...], targets: [...]}, of "
                + _listed(source_names)
            )

    def pair_data_of(self, source: str, query: Item, target: Item) -> Mapping[str, float]:
        """See Objective: 1.0 for a side whose item is rebuilt."""
        sides = {
            "query": (query, self.visual_sources.queries),
            "target": (target, self.visual_sources.targets),
        }
        own = {
            f"{side}_is_visual": float(source in names and is_purely_visual(item))
            for side, (item, names) in sides.items()
        }
        return {**super().pair_data_of(source, query, target), **own}

    def build_head(self, backbone_config: Any) -> Head:
        """See Objective. Raises ConfigError for a backbone whose width or depth does not fit."""
        text = backbone_config.get_text_config()
        if text.hidden_size % NUM_HEADS:
            raise ConfigError(
                f"objective vein: the backbone's hidden size {text.hidden_size} is no multiple of the "
                f"decoder's {NUM_HEADS} heads; train this backbone with objective: contrastive"
            )
        if self.layers > text.num_hidden_layers:
            raise ConfigError(
                f"loss.layers={self.layers} must be <= the backbone's {text.num_hidden_layers} layers"
            )
        return MaskedReconstruction(
            hidden_size=text.hidden_size,
            vocabulary_size=text.vocab_size,
            image_token_id=backbone_config.image_token_id,
            num_states=self.layers,
            mask_ratio=self.mask_ratio,
            dropout=self.decoder_dropout,
        )

    def __call__(
        self, query: Encoded, target: Encoded, negative: Encoded, batch: Batch, fusion: FusionConfig
    ) -> ObjectiveResult:
        """See Objective.

        The reconstruction is a mean over all masked tokens of the global batch (ours): its weight depends
        neither on ranks nor on chunks nor on the number of items. The losses of pairs are the contrastive
        ones; the reconstruction is never above 2.
        """
        contrastive = super().__call__(query, target, negative, batch, fusion)
        sum_R, num_R = (torch.cat([query[name], target[name]]) for name in ("reconstruction", "num_masked"))
        num_R = num_R.detach()
        visual_R = torch.cat([batch.pair_data[f"{side}_is_visual"] for side in ("query", "target")])
        rebuilt = weighted_mean_over_all_rows(sum_R / num_R.clamp(min=1), visual_R * num_R)
        metrics = {
            **contrastive.metrics,
            "vein/contrastive": contrastive.loss.detach(),
            "vein/reconstruction": rebuilt.detach(),
            "vein/visual_items": (visual_R * (num_R > 0)).mean(),
        }
        return ObjectiveResult(
            loss=contrastive.loss + self.reconstruction_weight * rebuilt,
            metrics=metrics,
            pair_loss_B=contrastive.pair_loss_B,
        )


def is_purely_visual(item: Item) -> bool:
    """Whether an item is an image, and its text an instruction at most (ours).

    Where the source keeps the instruction apart, nothing else may be in the text. Else the text must be one
    sentence and end with it: `Represent the given image.` is an instruction, `Identify the object: a dog` or
    a second sentence is more.
    """
    if item.image is None:
        return False
    rest = item.text.replace(IMAGE_PLACEHOLDER, "", 1)
    if item.instruction:
        return not rest.replace(item.instruction, "", 1).strip()
    return re.fullmatch(r"[^.:?!\n]*[.:?!]?", rest.strip()) is not None


class MaskedReconstruction(Head):
    """Gives of each row "reconstruction" (B,), the sum of 1 - cosine over its masked visual tokens, and
    "num_masked" (B,), their number, without gradient. Both are 0 for a row without an image.

    At each of the last layers: k = max(1, floor(mask_ratio * L)) of an image's L tokens are drawn and
    masked; one learned token takes their place. A decoder layer reads [the item's state at the global prompt;
    the masked tokens] with the others as memory. Sinusoidal positions, those of the tokens among the image's,
    are added to masked tokens, to memory and to what is to be rebuilt, not to the item's state. No gradient
    reaches the visual states; it reaches the item's.

    Ours: one decoder for all layers; a row whose every token is masked attends to a zero; rows without an
    image go through it too, so that no rank leaves it out; nothing of that counts.
    """

    is_random = True

    def __init__(
        self,
        *,
        hidden_size: int,
        vocabulary_size: int,
        image_token_id: int,
        num_states: int,
        mask_ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_states, self.mask_ratio = num_states, mask_ratio
        self.image_token_id, self.vocabulary_size = image_token_id, vocabulary_size
        self.mask_token = nn.Parameter(torch.randn(hidden_size) * 0.02)
        self.decoder = nn.TransformerDecoderLayer(
            hidden_size, NUM_HEADS, dim_feedforward=2 * hidden_size, dropout=dropout, batch_first=True
        )

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        """See Head."""
        is_image_BT = self._image_tokens(inputs)
        item_B = inputs["prompt_start_B"] + self._prompt_length(inputs, embedding_BMD.shape[1]) - 1
        num_rows, device = len(item_B), item_B.device
        item_states = torch.cat([state[torch.arange(num_rows, device=device), item_B] for state in states])
        sums, counts = self._rebuild(
            torch.cat([state.detach() for state in states]),  # the layers are further rows
            item_states,
            is_image_BT.repeat(len(states), 1),
        )
        return {
            "reconstruction": sums.view(len(states), num_rows).sum(dim=0),
            "num_masked": counts.view(len(states), num_rows).sum(dim=0),
        }

    def draw(self, is_image_BT: Tensor) -> Tensor:
        """(B, T) a random number for each token; an image's tokens with the smallest are masked."""
        return torch.rand(is_image_BT.shape, device=is_image_BT.device)

    def _image_tokens(self, inputs: ModelInputs) -> Tensor:
        """(B, T) True at the tokens of an item's image; a blank image is behind the prompts."""
        return tokens_before_prompts(inputs) & (inputs["input_ids"] == self.image_token_id)

    def _prompt_length(self, inputs: ModelInputs, num_vectors: int) -> Tensor:
        """(B,) soft tokens of one prompt; their ids are above the vocabulary (agff/processor.py)."""
        return (inputs["input_ids"] >= self.vocabulary_size).sum(dim=1) // num_vectors

    def _rebuild(self, state_BTH: Tensor, item_BH: Tensor, is_image_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of 1 - cosine, number) of each row's masked tokens."""
        num_B = is_image_BT.sum(dim=1)
        share_B = (self.mask_ratio * num_B.double()).floor().clamp(min=1)  # in double, as `width` below
        num_masked_B = torch.where(num_B > 0, share_B, 0)
        # the masked tokens come first; their largest number follows from the width, not from the device
        width = max(1, int(self.mask_ratio * is_image_BT.shape[1]))
        order_BT = self.draw(is_image_BT).masked_fill(~is_image_BT, torch.inf).argsort(dim=1)
        masked_BK = order_BT[:, :width]
        counts_BK = torch.arange(width, device=num_B.device) < num_masked_B[:, None]
        is_masked_BT = torch.zeros_like(is_image_BT).scatter(1, masked_BK, counts_BK)
        place_BT = (is_image_BT.cumsum(dim=1) - 1).clamp(min=0)
        position_BTH = sinusoids(is_image_BT.shape[1], state_BTH)[place_BT]

        def at_masked(values_BTH: Tensor) -> Tensor:
            return values_BTH.gather(1, masked_BK[..., None].expand(-1, -1, values_BTH.shape[2]))

        position_BKH = at_masked(position_BTH)
        found_BKH = self._decode(
            torch.cat([item_BH[:, None], self.mask_token + position_BKH], dim=1),
            nn.functional.pad(counts_BK, (1, 0), value=True),
            state_BTH + position_BTH,
            is_image_BT & ~is_masked_BT,
        )
        dtype = torch.promote_types(found_BKH.dtype, torch.float32)
        wanted_BKH = (at_masked(state_BTH) + position_BKH).to(dtype)
        cosine_BK = nn.functional.cosine_similarity(found_BKH.to(dtype), wanted_BKH, dim=-1)
        return ((1 - cosine_BK) * counts_BK).sum(dim=1), num_masked_B.to(dtype)

    def _decode(
        self, input_BSH: Tensor, is_input_BS: Tensor, memory_BTH: Tensor, is_memory_BT: Tensor
    ) -> Tensor:
        """The decoder's output for all inputs but the first, the item's state."""
        memory_BTH = memory_BTH.masked_fill(~is_memory_BT[..., None], 0)
        is_empty_B1 = ~is_memory_BT.any(dim=1, keepdim=True)
        is_read_BT = torch.cat([is_memory_BT[:, :1] | is_empty_B1, is_memory_BT[:, 1:]], dim=1)
        output_BSH = self.decoder(
            input_BSH,
            memory_BTH,
            tgt_key_padding_mask=~is_input_BS,
            memory_key_padding_mask=~is_read_BT,
        )
        return output_BSH[:, 1:]


def sinusoids(num_positions: int, like: Tensor) -> Tensor:
    """(positions, H) sines and cosines of position / base^(2 i / H), alternating, with `like`'s H."""
    width = like.shape[-1]
    dtype = torch.promote_types(like.dtype, torch.float32)
    place_P1 = torch.arange(num_positions, dtype=dtype, device=like.device)[:, None]
    rate = POSITION_BASE ** (-torch.arange(0, width, 2, dtype=dtype, device=like.device) / width)
    return torch.stack([(place_P1 * rate).sin(), (place_P1 * rate).cos()], dim=2).flatten(1).to(like.dtype)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))
