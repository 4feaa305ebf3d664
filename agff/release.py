"""A release folder: everything needed to use a trained model, and vectors that prove it was loaded rightly.

<release>/backbone/            weights, configuration, tokenizer and image processor as Hugging Face has them
          adapter/             of a run with LoRA, where it is asked for: the adapter as peft has it
          processor/           of an adapter alone: configuration, tokenizer and image processor
          prompts.safetensors  the soft tokens
          head.safetensors     the head that makes the embeddings, where the objective has one
          golden.safetensors   embeddings of built-in items, compared at every load
          agff_config.json     the contract: prompts, limits, fusion, versions, origin, hashes of the files
          README.md            the model card
and, unless it has a head, what other libraries load it by (agff/ecosystem_files.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from agff.adapter_folder import ADAPTER_FOLDER, base_folder, check_base, with_adapter
from agff.backbone import load_backbone
from agff.backbone_folder import HEAD_FILE
from agff.contract import (
    CONVERT_AGAIN,
    Contract,
    check_files,
    read_contract,
    released_objective,
)
from agff.embedder import AnyItem, Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError, ConfigError
from agff.processor import ItemProcessor
from agff.release_files import (
    BACKBONE_FOLDER,
    GOLDEN_FILE,
    PROMPTS_FILE,
    fill_head,
    read_tensor,
    settings_folder,
)

MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
"""Between a golden vector, the checkpoint's own in float32, and the release's: 0.8 and 2.6 degrees.

Measured with 28 + 28 random layers: 1 - cosine is 1e-11 in float32 between AVX-512 and SSE; TF32, where a GPU
uses it, rounds 8 x finer than bfloat16, so about 5e-5; bfloat16 0.003, and such a model must be released in
float32. With the quickstart's 4 + 4 layers bfloat16 is at 0.0002.
"""


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    check: bool = True,
    backbone: str | Path | None = None,
) -> Embedder:
    """The model of a release folder, ready for `.encode(items)` and `.similarity(a, b)`. Needs no DeepSpeed.

    check: compare the files with those that were released, encode the built-in items and compare them with
    the release's golden vectors. backbone: of a release that is an adapter alone, the folder of the backbone
    that it is of; by default the one that is in the hub's cache. Nothing is downloaded. Raises
    CheckpointError when the folder is no release, is incomplete, damaged or of another format, or does not
    reproduce its golden vectors; ConfigError when the backbone of an adapter is not found.
    """
    folder = Path(folder)
    contract = read_contract(folder)
    if check:
        check_files(folder, contract)
    dtype = getattr(torch, contract.dtype)
    base = None
    if contract.weights == "adapter":
        base = base_folder(contract.base_model, Path(backbone) if backbone is not None else None)
        if check:
            check_base(base, contract.origin.get("backbone_sha256"))
    elif backbone is not None:
        raise ConfigError(
            f"{folder}: holds its own backbone; `backbone` is for a release of an adapter alone"
        )

    def load_weights() -> Any:
        if base is None:
            return load_backbone(folder / BACKBONE_FOLDER, dtype=dtype, attention="sdpa")
        return with_adapter(load_backbone(base, dtype=dtype, attention="sdpa"), folder / ADAPTER_FOLDER)

    embedder = released_embedder(folder, contract, load_weights)
    vectors, head = embedder.model.prompted_embedding.vectors, embedder.model.head
    vectors.data.copy_(read_tensor(folder / PROMPTS_FILE, "vectors", vectors.shape))
    if head is not None:
        fill_head(head.to(dtype), folder / HEAD_FILE)
    embedder.model.to(device)
    if check:
        try:
            check_golden(embedder, folder, dtype=contract.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to look at it all the same, pass check=False") from None
    return embedder


def released_embedder(folder: Path, contract: Contract, load_weights: Callable[[], Any]) -> Embedder:
    """The model of a release with the backbone that `load_weights` gives, before soft tokens and head are
    filled in."""
    settings = folder / settings_folder(contract.weights)
    with _named_errors(settings, contract):
        objective = released_objective(contract)
        backbone = load_weights()
        head = objective.build_head(backbone.config) if objective else None
        model = EmbeddingModel(backbone, contract.prompts, head)
        processor = ItemProcessor.from_folder(
            settings,
            prompts=contract.prompts,
            limits=contract.processor,
            cells=objective.image_cells if objective else None,
        )
    return Embedder(
        model,
        processor,
        contract.fusion,
        texts=contract.texts,
        objective=objective,
        truncations=contract.nested,
    )


def check_golden(embedder: Embedder, folder: Path, *, dtype: str) -> float:
    """Smallest cosine between the release's golden vectors and what the embedder makes of the same items now.

    Raises CheckpointError when the cosine of one vector is below MIN_COSINE, or not a number.
    """
    found_NMD = embedder.encode(list(golden_items().values()))
    golden_NMD = read_tensor(folder / GOLDEN_FILE, "embeddings", found_NMD.shape)
    cosine_N = torch.cosine_similarity(found_NMD, golden_NMD, dim=-1).amin(dim=1)
    if failed := [
        f"{cosine:.6f} of {name}"
        for name, cosine in zip(golden_items(), cosine_N.tolist(), strict=True)
        if not cosine >= MIN_COSINE[dtype]
    ]:
        rounding = ", or it does not bear bfloat16: convert with --dtype float32" * (dtype == "bfloat16")
        raise CheckpointError(
            f"{folder}: the loaded model does not reproduce its golden vectors: cosine {', '.join(failed)}, "
            f"at least {MIN_COSINE[dtype]} in {dtype}; weights, tokenizer or image processor are not the "
            f"released ones{rounding}; {CONVERT_AGAIN}"
        )
    return cosine_N.min().item()


def golden_items() -> dict[str, AnyItem]:
    """What a release is tried on, by what it is: drawn by this function, so that every machine has the
    same."""
    tall, wide = (
        Image.frombytes(
            "RGB",
            size,
            bytes(x * y * color % 256 for y in range(size[1]) for x in range(size[0]) for color in (1, 2, 5)),
        )
        for size in ((56, 84), (112, 56))
    )
    return {
        "a text": "a red heart",
        "an image": tall,
        "an image with a text": {"image": wide, "text": "What is in the picture?\n"},
    }


@contextlib.contextmanager
def _named_errors(folder: Path, contract: Contract) -> Iterator[None]:
    """Whatever transformers, tokenizers and safetensors raise for a release's files, as a CheckpointError."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{error}; {CONVERT_AGAIN}") from None
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{folder}: cannot be loaded: {type(error).__name__}: {first}; written with transformers "
            f"{contract.versions.get('transformers')}, here is {transformers.__version__}: install that "
            f"version, or {CONVERT_AGAIN}"
        ) from error
