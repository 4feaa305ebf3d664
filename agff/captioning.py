"""Captions of images and regions, through transformers' own generation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from agff.batch import ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.objectives.mm_gem_head import MmGemHead, NextToken
from agff.pooled_rows import CAPTION_START
from agff.vision import IMAGE_TOKENS


class Speaker(PreTrainedModel, GenerationMixin):
    """A backbone's language model and the head of its tokens, as `generate` wants them: the first call reads
    the embeddings of a row up to its last soft token, each further one a token."""

    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, language_model: Any, lm_head: NextToken) -> None:
        super().__init__(copy.deepcopy(language_model.config))  # transformers writes into it
        self.language_model: nn.Module = language_model
        self.lm_head = lm_head

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        *,
        prompt_position_ids: Tensor | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward`. prompt_position_ids: (B, ..., T); tokens behind count on from the last."""
        assert inputs_embeds is not None, "a row begins with embeddings"
        assert prompt_position_ids is not None
        arguments: dict[str, Any] = {"past_key_values": past_key_values}
        if is_first_iteration:
            return arguments | {"inputs_embeds": inputs_embeds, "position_ids": prompt_position_ids}
        num_said = past_key_values.get_seq_length() - inputs_embeds.shape[1]
        next_position = prompt_position_ids[..., -1:] + 1 + num_said
        return arguments | {"input_ids": input_ids[:, -1:], "position_ids": next_position}

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, 1, vocabulary) behind the last token; position_ids (B, T), or (B, 3, T) of M-RoPE."""
        assert position_ids is not None
        output = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids.transpose(0, 1) if position_ids.ndim == 3 else position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        )
        logits: Any = self.lm_head.logits(output.last_hidden_state[:, -1:]).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def generate(
    model: EmbeddingModel, inputs: ModelInputs, *, max_tokens: int, num_beams: int, end_id: int
) -> list[list[int]]:
    """Token ids of what the model says of each row, without the end of text: the likeliest token at each step
    (num_beams=1), or the best of a beam search.

    inputs: of rows that have an image or a region and equally many tokens."""
    assert isinstance(model.head, MmGemHead)
    inputs = model.with_image_tokens(inputs)
    ids_BT = inputs["input_ids"]
    if (inputs[CAPTION_START] != ids_BT.shape[1]).any():
        raise ValueError(f"rows of {inputs[CAPTION_START].tolist()} tokens; all must have equally many")
    embedded_BTH = model.prompted_embedding(ids_BT)
    is_image_BT1 = (ids_BT == model.backbone.config.image_token_id)[..., None]
    embedded_BTH = embedded_BTH.masked_scatter(is_image_BT1, inputs[IMAGE_TOKENS].to(embedded_BTH.dtype))
    in_order_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    speaker: Any = Speaker(model.tower.model.language_model, model.head.lm_head).eval()
    said = speaker.generate(
        inputs_embeds=embedded_BTH,
        prompt_position_ids=inputs.get("position_ids", in_order_BT),
        attention_mask=torch.ones_like(ids_BT),  # nothing is padded; without it `generate` guesses and warns
        generation_config=GenerationConfig(
            max_new_tokens=max_tokens,
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=end_id,
            pad_token_id=end_id,
        ),
    )
    return [row[: row.index(end_id)] if end_id in row else row for row in said.tolist()]
