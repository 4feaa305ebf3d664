"""A tiny backbone of each family, in two layouts: as transformers writes it today, and as it is published.

Published: flat configurations, old key names, several shards, a head that is not tied. Names and layouts are
those of config.json and model.safetensors.index.json of Qwen/Qwen2-VL-2B-Instruct,
Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-4B-Instruct and llava-hf/llava-onevision-qwen2-7b-ov-hf; the key
names of then and of today are listed in transformers' conversion_mapping.py too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from agff.backbone import load_backbone
from agff.batch import ModelInputs
from agff.family import Family
from tests.drawings import tiny_backbone

# no defaults of transformers, so that a number that is not read changes the embeddings
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
QWEN2_ROPE = {"rope_type": "default", "rope_theta": 2e4}
TEXT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 2e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}


def backbone_arguments(family: Family, inputs: ModelInputs) -> dict[str, Any]:
    """Of the backbone's own way from a chunk's pixels to hidden states."""
    return {**family.language_arguments(inputs), **family.tower_arguments(inputs)}


def special_tokens(folder: Path) -> dict[str, int]:
    """Of the tiny Qwen2-VL, whose tokenizer and image processor serve the later ones too."""
    tokens = json.loads((tiny_backbone(folder) / "config.json").read_text())
    return {name: tokens[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id")}


def qwen2_5_vl(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**VISION, "fullatt_block_indexes": [1]},
        **special_tokens(folder),
    )
    Qwen2_5_VLModel(config).save_pretrained(folder)


def qwen3_vl(folder: Path) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config={**VISION, "deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        **special_tokens(folder),
    )
    Qwen3VLModel(config).save_pretrained(folder)


def llava_onevision(folder: Path) -> None:
    from transformers import AutoTokenizer, LlavaOnevisionConfig, LlavaOnevisionModel
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tiny_backbone(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.save_pretrained(folder)
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": 520, "rope_parameters": QWEN2_ROPE},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    LlavaOnevisionModel(config).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints,
        crop_size={"height": 28, "width": 28},
    ).save_pretrained(folder)


BUILDERS = {
    "qwen2_vl": tiny_backbone,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
}


def published(today: Path, folder: Path) -> Path:
    """The backbone of `today` once more, in the published layout of its family; returns `folder`."""
    shutil.copytree(today, folder)
    config = published_config(json.loads((today / "config.json").read_text()))
    weights = load_backbone(today, dtype=torch.float32, attention="sdpa").state_dict()
    text = config.get("text_config", config)
    weights["lm_head.weight"] = torch.randn(text["vocab_size"], text["hidden_size"])
    write_published(folder, config, weights)
    return folder


def published_config(today: dict[str, Any]) -> dict[str, Any]:
    """config.json of the published layout with the numbers of today's."""
    model_type = today["model_type"]
    text = {name: today["text_config"][name] for name in TEXT}
    rope = today["text_config"]["rope_parameters"]
    if model_type == "llava_onevision":
        return published_llava(today, text, rope)
    vision_names = {
        "qwen2_vl": ("depth", "embed_dim", "hidden_size", "num_heads", "mlp_ratio", "patch_size"),
        "qwen2_5_vl": (*VISION, "fullatt_block_indexes"),
        "qwen3_vl": (*VISION, "deepstack_visual_indexes", "num_position_embeddings"),
    }[model_type]
    vision = {name: today["vision_config"][name] for name in vision_names}
    tokens = {name: today[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    if model_type == "qwen3_vl":
        return published_qwen3(text | {"head_dim": today["text_config"]["head_dim"]}, vision, tokens, rope)
    return flat_qwen(model_type, text=text, vision=vision, tokens=tokens, rope=rope)


def flat_qwen(
    model_type: str,
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
    tokens: dict[str, int],
    rope: dict[str, Any],
) -> dict[str, Any]:
    """Of a Qwen2-VL or Qwen2.5-VL: the language model's settings lie beside the vision tower's."""
    common = {"in_chans": 3, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    windows = {"hidden_act": "silu", "window_size": 112, "tokens_per_second": 2}
    return {
        "architectures": [
            "Qwen2VLForConditionalGeneration"
            if model_type == "qwen2_vl"
            else "Qwen2_5_VLForConditionalGeneration"
        ],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": model_type,
        "rope_theta": rope["rope_theta"],
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        **text,
        **tokens,
        "vision_config": common | (windows if model_type == "qwen2_5_vl" else {}) | vision,
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }


def published_qwen3(
    text: dict[str, Any], vision: dict[str, Any], tokens: dict[str, int], rope: dict[str, Any]
) -> dict[str, Any]:
    """Of a Qwen3-VL: nested, with rope_scaling beside rope_theta."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": rope["mrope_section"],
                "rope_type": "default",
            },
            "rope_theta": rope["rope_theta"],
            "use_cache": True,
            **text,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": "qwen3_vl",
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        **tokens,
    }


def published_llava(today: dict[str, Any], text: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Of a LLaVA-OneVision: image_token_index, and a text model that names where it came from."""
    vision_names = (
        "hidden_size",
        "image_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
    )
    vision = {name: today["vision_config"][name] for name in (*vision_names, "patch_size")}
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": today["image_grid_pinpoints"],
        "image_token_index": today["image_token_index"],
        "video_token_index": today["video_token_index"],
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "Qwen/Qwen2-7B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "rope_theta": rope["rope_theta"],
            "sliding_window": 131072,
            "torch_dtype": "bfloat16",
            **text,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.45.0.dev0",
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def published_name(model_type: str, name: str) -> str:
    """Of a parameter that is `name` in transformers' model without a head; "lm_head.weight" is the head's."""
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        return name.replace("language_model.", "model.", 1)
    if model_type == "qwen3_vl":
        return name if name.startswith("lm_head.") else f"model.{name}"
    assert model_type == "llava_onevision", model_type
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    for now, then in (
        ("language_model.", "language_model.model."),
        ("vision_tower.", "vision_tower.vision_model."),
    ):
        name = then + name.removeprefix(now) if name.startswith(now) else name
    return name


def write_published(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """config.json and model-0000i-of-0000n.safetensors with their index; `weights` by today's names."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "model.safetensors").unlink(missing_ok=True)
    size_bytes = sum(tensor.nbytes for tensor in weights.values())
    renamed = {
        published_name(config["model_type"], name): tensor.contiguous() for name, tensor in weights.items()
    }
    save_torch_state_dict(renamed, folder, max_shard_size=size_bytes // 2)
    assert (folder / "model.safetensors.index.json").exists()
