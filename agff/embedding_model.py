"""The embedding model: a multimodal language model with learnable prompts; items in, unit vectors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agff.prompts import PromptConfig, PromptedEmbedding


class EmbeddingModel(nn.Module):
    """Backbone (without language-model head) + soft tokens -> (B, M, D) unit embeddings, the global one at
    index 0.

    A vector is the last hidden state at the last soft token of its block, L2-normalised (README, Method 1,
    our definition).
    """

    def __init__(self, backbone: Any, prompts: PromptConfig) -> None:
        super().__init__()
        self.prompts = prompts
        self.backbone = backbone
        backbone.set_input_embeddings(PromptedEmbedding(backbone.get_input_embeddings(), prompts.num_tokens))
        steps = torch.arange(1, prompts.num_vectors + 1) * prompts.tokens_per_prompt - 1
        self.register_buffer("block_end_M", steps, persistent=False)
        self.block_end_M: Tensor

    @property
    def prompted_embedding(self) -> PromptedEmbedding:
        """The input embedding that holds the soft tokens."""
        return self.backbone.get_input_embeddings()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, M, D) float32 unit embeddings of one chunk (`ItemProcessor.__call__`).

        Under ZeRO-3 every parameter is gathered on the way: every rank must call it, with the same number of
        chunks.
        """
        inputs = dict(inputs)
        prompt_start_B = inputs.pop("prompt_start_B")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.prompted_embedding.vectors.dtype)
        hidden_BTH = self.backbone(**inputs, use_cache=False).last_hidden_state
        block_end_BM = prompt_start_B[:, None] + self.block_end_M
        rows_B1 = torch.arange(hidden_BTH.shape[0], device=hidden_BTH.device)[:, None]
        return nn.functional.normalize(hidden_BTH[rows_B1, block_end_BM].float(), dim=-1)
