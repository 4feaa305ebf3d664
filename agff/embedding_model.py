"""The embedding model: a multimodal language model with learnable prompts; items in, unit vectors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agff.batch import Encoded, ModelInputs
from agff.families import family_of
from agff.objectives.objective import Head
from agff.prompts import PromptConfig, PromptedEmbedding
from agff.shared_images import IMAGE_FEATURES
from agff.vision import VisionTower, tower_of


class EmbeddingModel(nn.Module):
    """Backbone (without language-model head) + soft tokens -> (B, M, D) unit embeddings, the global one at
    index 0; and what the head of a training objective reads, if it has one.

    A vector is the last hidden state at the last soft token of its block, L2-normalised (README, Method 1,
    our definition).
    """

    def __init__(self, backbone: Any, prompts: PromptConfig, head: Head | None = None) -> None:
        super().__init__()
        self.prompts = prompts
        self.family = family_of(backbone.config)
        self.backbone = backbone
        self.head = head
        backbone.set_input_embeddings(PromptedEmbedding(backbone.get_input_embeddings(), prompts.num_tokens))
        steps = torch.arange(1, prompts.num_vectors + 1) * prompts.tokens_per_prompt - 1
        self.register_buffer("block_end_M", steps, persistent=False)
        self.block_end_M: Tensor

    @property
    def prompted_embedding(self) -> PromptedEmbedding:
        """The input embedding that holds the soft tokens."""
        return self.backbone.get_input_embeddings()

    @property
    def tower(self) -> VisionTower:
        """The backbone's vision tower."""
        return tower_of(self.backbone)

    def encode_images(self, inputs: ModelInputs) -> Tensor:
        """The vision tower's output for a chunk's images; as IMAGE_FEATURES of the inputs it replaces their
        pixels.

        Under ZeRO-3 the tower is gathered on the way: every rank must call it equally often.
        """
        arguments = self.family.tower_arguments(inputs)
        pixels = arguments["pixel_values"].to(self.prompted_embedding.vectors.dtype)
        return self.tower.encode({**arguments, "pixel_values": pixels})

    def with_image_tokens(self, inputs: ModelInputs) -> ModelInputs:
        """The inputs with IMAGE_FEATURES, unless they hold no image; where the head pools images, with
        IMAGE_TOKENS too.

        Under ZeRO-3 a collective, as `encode_images`, unless the features are there."""
        if "pixel_values" in inputs:
            inputs = self.tower.with_features(inputs, self.encode_images(inputs))
        if self.head is None or self.head.image_cells is None or IMAGE_FEATURES not in inputs:
            return inputs
        return self.head.with_image_tokens(inputs, self.tower.maps(inputs))

    def forward(self, inputs: ModelInputs) -> Encoded:
        """Of each of the B rows of one chunk (`ItemProcessor.__call__`): "embedding", (B, M, D) unit vectors
        in float32 or better, and so are the outputs of the head.

        Inputs that hold IMAGE_FEATURES, or no image, do without the vision tower. Under ZeRO-3 every
        parameter in use is gathered on the way: every rank must call it, with the same number of chunks.
        Raises ValueError, with its name, for an output of the head that has not one row for each.
        """
        inputs = self.with_image_tokens(inputs)
        arguments = self.tower.backbone_inputs(inputs)
        num_states = self.head.num_states if self.head is not None else 1
        wanted = list(range(-num_states, 0)) if num_states > 1 else False  # all others are not kept
        # no padding mask: attention is causal, and padding is behind the last prompt
        output = self.backbone(**arguments, use_cache=False, output_hidden_states=wanted)
        hidden_BTH = output.last_hidden_state
        block_end_BM = inputs["prompt_start_B"][:, None] + self.block_end_M
        rows_B1 = torch.arange(hidden_BTH.shape[0], device=hidden_BTH.device)[:, None]
        state_BMD = _at_least_float32(hidden_BTH[rows_B1, block_end_BM])
        embedding_BMD = nn.functional.normalize(state_BMD, dim=-1)
        encoded = {"embedding": embedding_BMD}
        if self.head is None:
            return encoded
        states = output.hidden_states[-num_states:] if wanted else (hidden_BTH,)
        found = self.head(states, inputs, embedding_BMD)
        for name, tensor in found.items():
            if tensor.shape[:1] != embedding_BMD.shape[:1]:
                raise ValueError(
                    f"output {name!r} of {type(self.head).__name__} has shape {tuple(tensor.shape)}; its "
                    f"first axis must be the {len(embedding_BMD)} rows of the chunk"
                )
        # the head's own "embedding", where it has one, takes the place of the prompts' states
        return {**encoded, **{name: _at_least_float32(tensor) for name, tensor in found.items()}}


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a forward in training mode depends on the random state: dropout anywhere, or a random head."""
    return any(
        (isinstance(module, Head) and module.is_random)
        or (module.training and (_dropout_of(module, "p") or _dropout_of(module, "attention_dropout")))
        for module in model.modules()
    )


def _dropout_of(module: nn.Module, name: str) -> bool:
    """`p` of a dropout module, or what an attention module of transformers hands to its function."""
    value = getattr(module, name, 0.0)
    return isinstance(value, float) and value > 0
