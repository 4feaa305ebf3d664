"""A release folder: everything needed to use a trained model, and vectors that prove it was loaded rightly.

<release>/backbone/            weights, configuration, tokenizer and image processor as Hugging Face has them
          prompts.safetensors  the soft tokens
          head.safetensors     the head that makes the embeddings, where the objective has one
          golden.safetensors   embeddings of built-in items, compared at every load
          agff_config.json     the contract: prompts, limits, fusion, versions, origin, hashes of the files
          README.md            the model card
and, unless it has a head, what other libraries load it by (agff/ecosystem_files.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agff.backbone import load_backbone
from agff.backbone_folder import HEAD_FILE
from agff.contract import (
    CARD_FILE,
    CONVERT_AGAIN,
    Contract,
    check_files,
    fingerprints,
    read_contract,
    released_objective,
    write_contract,
)
from agff.ecosystem_files import write_ecosystem_files
from agff.embedder import AnyItem, Embedder
from agff.embedding_model import EmbeddingModel
from agff.errors import CheckpointError, ConfigError
from agff.model_card import model_card
from agff.objectives import name_of
from agff.objectives.objective import Head
from agff.processor import ItemProcessor
from agff.vocabulary_prompts import add_to_vocabulary

PROMPTS_FILE, GOLDEN_FILE = "prompts.safetensors", "golden.safetensors"
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
"""Between a golden vector, the checkpoint's own in float32, and the release's: 0.8 and 2.6 degrees.

Measured with 28 + 28 random layers: 1 - cosine is 1e-11 in float32 between AVX-512 and SSE; TF32, where a GPU
uses it, rounds 8 x finer than bfloat16, so about 5e-5; bfloat16 0.003, and such a model must be released in
float32. With the quickstart's 4 + 4 layers bfloat16 is at 0.0002.
"""


def save_release(
    embedder: Embedder, folder: Path, *, origin: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> Any:
    """Write a release; return the backbone that was written: unwrapped, adapters merged. The embedder is used
    up by it.

    The golden vectors are the embedder's as it comes, in float32; then adapters are merged and the weights
    rounded to `dtype`. origin: JSON values that say where the weights come from (run, step, backbone).
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": embedder.encode(list(golden_items().values()))}, folder / GOLDEN_FILE)
    model, processor = _merge_adapters(embedder.model).to(dtype), embedder.processor
    vectors = model.prompted_embedding.vectors.detach().cpu().clone()
    save_file({"vectors": vectors}, folder / PROMPTS_FILE)
    if model.head is not None:
        save_file(model.head.state_dict(), folder / HEAD_FILE)
    backbone = plain_backbone(model)
    vocabulary = None
    if model.head is None:  # a head is code of ours, and without it these would be other vectors
        vocabulary = add_to_vocabulary(processor.tokenizer, backbone.config, processor.prompts)
        table = backbone.get_input_embeddings()
        table.weight.data = vocabulary.in_table(table.weight.data, vectors)
    backbone.save_pretrained(folder / "backbone")
    processor.save(folder / "backbone")
    if vocabulary is not None:
        write_ecosystem_files(folder, vocabulary, backbone.config, embedder.texts)
    contract = Contract(
        prompts=processor.prompts,
        processor=processor.limits,
        fusion=embedder.fusion,
        nested=embedder.truncations,
        texts=embedder.texts,
        objective=name_of(embedder.objective) if embedder.objective else None,
        objective_settings=asdict(embedder.objective) if embedder.objective else {},
        pooling="last soft token of each prompt block, L2-normalised"
        + ("; then the head" if model.head is not None else ""),
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        origin=dict(origin),
        files=fingerprints(folder),
    )
    (folder / CARD_FILE).write_text(model_card(contract), encoding="utf-8")
    write_contract(folder, contract)
    return backbone


def load(folder: str | Path, *, device: str | torch.device = "cpu", check: bool = True) -> Embedder:
    """The model of a release folder, ready for `.encode(items)` and `.similarity(a, b)`. Needs no DeepSpeed.

    check: compare the files with those that were released, encode the built-in items and compare them with
    the release's golden vectors. Raises CheckpointError when the folder is no release, is incomplete, damaged
    or of another format, or does not reproduce its golden vectors.
    """
    folder = Path(folder)
    contract = read_contract(folder)
    if check:
        check_files(folder, contract)
    dtype = getattr(torch, contract.dtype)
    with _named_errors(folder / "backbone", contract):
        objective = released_objective(contract)
        backbone = load_backbone(folder / "backbone", dtype=dtype, attention="sdpa")
        head = objective.build_head(backbone.config) if objective else None
        model = EmbeddingModel(backbone, contract.prompts, head)
        processor = ItemProcessor.from_folder(
            folder / "backbone",
            prompts=contract.prompts,
            limits=contract.processor,
            cells=objective.image_cells if objective else None,
        )
    vectors = model.prompted_embedding.vectors
    vectors.data.copy_(read_tensor(folder / PROMPTS_FILE, "vectors", vectors.shape))
    if head is not None:
        fill_head(head.to(dtype), folder / HEAD_FILE)
    embedder = Embedder(
        model.to(device),
        processor,
        contract.fusion,
        texts=contract.texts,
        objective=objective,
        truncations=contract.nested,
    )
    if check:
        try:
            check_golden(embedder, folder, dtype=contract.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to look at it all the same, pass check=False") from None
    return embedder


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


def _merge_adapters(model: EmbeddingModel) -> EmbeddingModel:
    """The same model with its adapters, if it has any, merged into the weights."""
    if hasattr(model.backbone, "merge_and_unload"):
        model.backbone = model.backbone.merge_and_unload()
    return model


def plain_backbone(model: EmbeddingModel) -> Any:
    """The backbone with its own embedding, key names as transformers knows them; the model is used up by
    it."""
    backbone = _merge_adapters(model).backbone
    backbone.set_input_embeddings(model.prompted_embedding.base)
    return backbone


def fill_head(head: Head, path: Path) -> None:
    """Weights of a release's head. Raises CheckpointError when names or shapes differ."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {CONVERT_AGAIN}") from None
    wanted = head.state_dict()
    if problems := [
        f"{name} is {list(found[name].shape) if name in found else 'missing'}, must be "
        f"{list(wanted[name].shape) if name in wanted else 'absent'}"
        for name in sorted(wanted.keys() | found.keys())
        if name not in wanted or name not in found or found[name].shape != wanted[name].shape
    ]:
        raise CheckpointError(f"{path}: {'; '.join(problems)}; {CONVERT_AGAIN}")
    head.load_state_dict(found)


def read_tensor(path: Path, name: str, shape: torch.Size) -> Tensor:
    """One tensor of a release's file. Raises CheckpointError when it is absent or of another shape."""
    try:
        tensor = load_file(path)[name]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot read tensor `{name}`: {error}; {CONVERT_AGAIN}") from None
    if tensor.shape != shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: `{name}` is {tensor.dtype} {list(tensor.shape)}, must be floating-point {list(shape)}; "
            f"{CONVERT_AGAIN}"
        )
    return tensor


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
