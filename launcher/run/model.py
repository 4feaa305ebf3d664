"""Building the model of a run: backbone and prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig

from agff.backbone import choose_trainable, empty_backbone, empty_weights, load_backbone
from agff.embedding_model import EmbeddingModel
from agff.processor import ItemProcessor
from agff.prompts import initial_vectors
from agff.zero3 import leaving_linear
from launcher.run.config import ResolvedRun, RunConfig
from launcher.run.first_stage import backbone_folder, start_from_first_stage


def build_model(run: ResolvedRun, processor: ItemProcessor) -> EmbeddingModel:
    """The model to train. Under ZeRO-3 it is partitioned while loading: a collective, after the process group
    exists."""
    partitioned = HfDeepSpeedConfig(leaving_linear(run.deepspeed)) if run.zero_stage == 3 else None
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    model = untrained_model(run.config, dtype=dtype, attention=run.config.backbone.attention)
    del partitioned  # transformers looks at it for as long as it lives, and only loading needs it
    if run.config.prompts.start_from is not None:
        start_from_first_stage(model, run.config)
        return model
    embedding = model.prompted_embedding

    def embed(ids: Any) -> Any:
        return embedding.base.weight.detach()[ids.to(embedding.base.weight.device)]

    with deepspeed.zero.GatheredParameters([embedding.base.weight], enabled=run.zero_stage == 3):
        vectors = initial_vectors(run.config.prompts, processor.tokenize, embed)
    embedding.vectors.data.copy_(vectors)
    return model


def check_objective(config: RunConfig) -> None:
    """Raise ConfigError where the objective's settings do not fit the backbone in its folder."""
    folder = backbone_folder(config.backbone.path)
    config.loss.check_backbone(AutoConfig.from_pretrained(folder, local_files_only=True))


def untrained_model(config: RunConfig, *, dtype: torch.dtype, attention: str) -> EmbeddingModel:
    """Backbone weights of the folder; adapters, soft tokens and head as they are created; in training
    mode."""
    backbone = load_backbone(backbone_folder(config.backbone.path), dtype=dtype, attention=attention)
    head = config.loss.build_head(backbone.config)
    if head is not None:
        head = head.to(dtype)  # ZeRO wants one precision for all
        head.load_from(backbone_folder(config.backbone.path), backbone.config)
    return EmbeddingModel(choose_trainable(backbone, config.backbone), config.prompts.of_model, head)


def empty_model(config: RunConfig) -> EmbeddingModel:
    """As `untrained_model`, but without any weights: the parameters, whose names and shapes are right, are on
    the meta device."""
    backbone = empty_backbone(backbone_folder(config.backbone.path), dtype=torch.float32, attention="sdpa")
    chosen = replace(config.backbone, gradient_checkpointing=False)
    with empty_weights():
        head = config.loss.build_head(backbone.config)
        return EmbeddingModel(choose_trainable(backbone, chosen), config.prompts.of_model, head)
