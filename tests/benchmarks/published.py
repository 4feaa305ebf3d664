"""Sizes of the published models that recipes train, as far as they decide FLOPs and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaOnevisionConfig, Qwen2VLConfig

from launcher.run.config import RunConfig
from launcher.run.config_file import read_recipe

RECIPES = Path(__file__).parents[2] / "launcher/recipes"


def model_of(config: RunConfig) -> Any:
    """Configuration of a recipe's published model; of a second stage, which begins with a release, that of
    the first."""
    name = Path(config.backbone.path).name
    first = RECIPES / f"{name}.yaml"
    return model_of(read_recipe(first)) if first.exists() else published_config(name)


def published_config(name: str) -> Any:
    """config.json of the published model of that folder name."""
    if name == "Qwen2-VL-2B-Instruct":
        return _qwen2_vl(hidden=1536, inner=8960, heads=12, keys=2, vocabulary=151936)
    if name == "Qwen2-VL-7B-Instruct":
        return _qwen2_vl(hidden=3584, inner=18944, heads=28, keys=4, vocabulary=152064)
    assert name == "llava-onevision-qwen2-7b-ov-hf", f"the numbers of {name} are not known here"
    sides = range(384, 2305, 384)
    return LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152128,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
    )


def _qwen2_vl(*, hidden: int, inner: int, heads: int, keys: int, vocabulary: int) -> Qwen2VLConfig:
    """Both sizes have 28 layers and the same vision tower, which ends at the language model's width."""
    return Qwen2VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": 28,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": hidden,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
        },
    )
