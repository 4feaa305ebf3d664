"""A small Qwen2-VL with random weights, tokenizer and image processor: an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.quickstart.qwen_bpe import SPECIAL_TOKENS, bpe_tables, load_ranks

PATCH_PX = 14
MERGE = 2


@dataclass(frozen=True, kw_only=True)
class BackboneSizes:
    """The quickstart's: 4.74M parameters, 4 tokens for an image of 56 px, 16 for a sheet of 112 px."""

    num_ranks: int = 8192
    """Of the Qwen vocabulary; special tokens come on top."""
    hidden: int = 256
    num_layers: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate: int = 704
    vision_hidden: int = 192
    vision_layers: int = 2
    vision_heads: int = 4
    min_pixels: int = 56 * 56
    max_pixels: int = 112 * 112
    """A larger image is scaled down to this many pixels, its aspect ratio kept."""
    initializer_range: float = 0.06
    """Standard deviation of the weights, 1/sqrt(hidden). transformers' 0.02 is for hidden sizes above 2,000:
    here, after 150 steps of 64 name-drawing pairs, it leaves the loss at 3.97, 0.04 at 3.09, 0.06 at 2.74,
    0.08 at 2.93 (with 4 + 4 layers; 2 CPU cores, one seed, chance 4.16)."""


def build_tiny_qwen2vl(folder: Path, *, seed: int, sizes: BackboneSizes | None = None) -> None:
    """Write config.json, model.safetensors, the tokenizer's files and preprocessor_config.json into `folder`.

    The same seed and sizes give the same bytes. The random state of the caller is left as it was.
    """
    sizes = sizes or BackboneSizes()
    folder.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(folder, sizes)
    _save_model(folder, sizes, seed=seed)
    _save_image_processor(folder, sizes)


def _save_tokenizer(folder: Path, sizes: BackboneSizes) -> None:
    from transformers import AddedToken, Qwen2Tokenizer

    tables = bpe_tables(load_ranks(sizes.num_ranks))
    merges: Any = tables.merges  # annotated as strings there, passed on to a class that takes pairs
    tokenizer = Qwen2Tokenizer(vocab=dict(tables.vocab), merges=merges, model_max_length=32768)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)


def _save_model(folder: Path, sizes: BackboneSizes, *, seed: int) -> None:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(_config(sizes))
    model.save_pretrained(folder)


def _config(sizes: BackboneSizes) -> Any:
    from transformers import Qwen2VLConfig

    special = {token: sizes.num_ranks + index for index, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": sizes.num_ranks + len(SPECIAL_TOKENS),
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "num_key_value_heads": sizes.num_kv_heads,
            "max_position_embeddings": 32768,
            "initializer_range": sizes.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": mrope_section(sizes.hidden // sizes.num_heads),
            },
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": sizes.vision_layers,
            "embed_dim": sizes.vision_hidden,
            "num_heads": sizes.vision_heads,
            "hidden_size": sizes.hidden,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "initializer_range": sizes.initializer_range,
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def mrope_section(head_dim: int) -> list[int]:
    """Rotary frequencies for time, height and width; they sum to head_dim / 2, a quarter of them for time."""
    half = head_dim // 2
    spatial = (half - half // 4) // 2
    return [half - 2 * spatial, spatial, spatial]


def _save_image_processor(folder: Path, sizes: BackboneSizes) -> None:
    """The file as Qwen2-VL's own releases write it: every version of transformers reads these keys."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": sizes.min_pixels,
        "max_pixels": sizes.max_pixels,
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
