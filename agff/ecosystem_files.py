"""What other programs read of a release: transformers, sentence-transformers, and servers that read the same
files. No code of ours runs there, and none is to be trusted.

<release>/modules.json, config_sentence_transformers.json, 1_MultiVectorMask/, 2_Normalize/
              MultiVectorEncoder("<release>"): all M vectors of an item
          backbone/modules.json, config_sentence_transformers.json, 1_Pooling/, 2_Normalize/
              SentenceTransformer("<release>/backbone"): the global vector
          backbone/chat_template.jinja, sentence_bert_config.json, processor_config.json
              of both, and of transformers

Both read the weights of backbone/: there is no second copy, and no link. They differ in the prompt that
sentence-transformers hands to the chat template as a system message (agff/chat_template.py). The values are
those that sentence-transformers 6.2 writes itself (tests/ecosystem compares them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from agff.batch import TextRule
from agff.chat_template import ALL_VECTORS, DOCUMENTS_ONLY, chat_template
from agff.contract import Contract
from agff.families import family_of
from agff.files import write_text
from agff.vocabulary_prompts import VocabularyPrompts

LAYOUT_VERSION = "6.2.0"
"""Of sentence-transformers, whose layout this is."""
MODULE = "sentence_transformers.{}"
TRANSFORMER = "base.modules.transformer.Transformer"
NORMALIZE = "base.modules.normalize.Normalize"
POOLING = "sentence_transformer.modules.pooling.Pooling"
MASK = "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"


def write_ecosystem_files(
    folder: Path, vocabulary: VocabularyPrompts, model_config: Any, texts: TextRule
) -> None:
    """Write them into a release folder whose backbone, with the prompts in its vocabulary, is there."""
    family, backbone = family_of(model_config), folder / "backbone"
    write_text(backbone / "chat_template.jinja", chat_template(vocabulary, family, texts))
    _write_json(backbone / "sentence_bert_config.json", _transformer_settings())
    if settings := family.stock_processor(model_config):
        _write_json(backbone / "processor_config.json", settings)
    pooling = {
        "embedding_dimension": model_config.get_text_config().hidden_size,
        "pooling_mode": "lasttoken",
        "include_prompt": True,
    }
    _write_model(
        backbone,
        _model_settings("SentenceTransformer", similarity="cosine"),
        {
            "": (TRANSFORMER, None),
            "1_Pooling": (POOLING, pooling),
            "2_Normalize": _normalize("sentence_embedding"),
        },
    )
    mask = {
        "skiplist_words": [],
        "skiplist_tasks": ["document"],
        "keep_only_token_ids": vocabulary.vector_ids,
    }
    _write_model(
        folder,
        _model_settings(
            "MultiVectorEncoder",
            # the mask does not apply to queries, so all items are encoded as documents
            prompts={"query": DOCUMENTS_ONLY, "document": ALL_VECTORS},
            default_prompt="document",
        ),
        {
            "backbone": (TRANSFORMER, None),
            "1_MultiVectorMask": (MASK, mask),
            "2_Normalize": _normalize("token_embeddings"),
        },
    )


def _transformer_settings() -> dict[str, Any]:
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": forward,
            "image": forward,
            "message": {**forward, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        # whoever cuts the end of a text with an image, cuts the prompts
        "processing_kwargs": {"text": {"truncation": False}},
        # several texts in one sequence have no positions of their own in these backbones
        "unpad_inputs": False,
        # PIL's resizing, as in training: torchvision's differs by a level in 0.5 % of the values, which was
        # up to 5e-4 of a vector's component in the tiny models
        "processor_kwargs": {"use_fast": False},
    }


def _model_settings(
    model_type: str,
    *,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
    similarity: str | None = None,
) -> dict[str, Any]:
    return {
        "__version__": {
            "pytorch": torch.__version__,
            "sentence_transformers": LAYOUT_VERSION,
            "transformers": transformers.__version__,
        },
        "default_prompt_name": default_prompt,
        "model_type": model_type,
        "prompts": prompts or {"document": "", "query": ""},
        "similarity_fn_name": similarity,
    }


def _normalize(feature: str) -> tuple[str, dict[str, Any]]:
    return NORMALIZE, {"module_input_name": feature, "module_output_name": feature}


def _write_model(
    folder: Path, settings: dict[str, Any], modules: dict[str, tuple[str, dict[str, Any] | None]]
) -> None:
    """modules: by their folder in this one, class and settings; None: the folder has its own."""
    _write_json(folder / "config_sentence_transformers.json", settings)
    _write_json(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": MODULE.format(kind)}
            for index, (path, (kind, _)) in enumerate(modules.items())
        ],
    )
    for path, (_, values) in modules.items():
        if values is not None:
            _write_json(folder / path / "config.json", values)


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2) + "\n")


def how_to_load(contract: Contract) -> str:
    """Of the card: how other libraries load the release, or why they cannot. Empty for one without these
    files, as an adapter alone."""
    if contract.objective is not None:
        return (
            f"The head of {contract.objective} makes the vectors, and no other library has it: use "
            "`agff.load`.\n\n"
        )
    if "modules.json" not in contract.files:
        return ""
    return f"""Other libraries load it without code of ours (torchvision is needed, trust_remote_code is not):

    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    items = ["a red heart", {{"image": "picture.jpg", "text": "What is in the picture?"}}]
    SentenceTransformer("this folder/backbone").encode(items)     # the global vectors
    MultiVectorEncoder("this folder").encode_document(items)      # all vectors; queries are encoded alike

    from transformers import AutoModel, AutoProcessor
    model = AutoModel.from_pretrained("this folder/backbone")
    processor = AutoProcessor.from_pretrained("this folder/backbone", use_fast=False)
    item = [{{"role": "user", "content": [{{"type": "image", "path": "picture.jpg"}}]}}]
    inputs = processor.apply_chat_template(item, tokenize=True, return_dict=True, return_tensors="pt")
    model(**inputs).last_hidden_state[:, -1]                      # the global vector, before normalisation

The system message `{ALL_VECTORS}` asks for all vectors: the states of the tokens that
1_MultiVectorMask/config.json lists. All of them are those of `agff.load`, but a text is not cut after
{contract.processor.max_tokens} tokens, and a text that spells a control token such as `<|im_end|>` is
refused, as is a prompt of your own. With `use_fast=True` resized images differ by a level here and there.
Images must be opaque, with 8 bits a level: transparency is white here and whatever lies below it there,
and 16 bits are cut off there; `agff.images.open_image(path, path)` makes a PIL image that all read alike.
A text that is the path of an image file there, or its address on the web, is taken for the image.
MaxSim is not the similarity that was trained. vLLM reads the files of `backbone/`; that is untried.

"""
