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
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from agff.adapter_folder import ADAPTER_FOLDER, base_folder, check_base, with_adapter, write_adapter
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
from agff.lazy_tensor import LazyTensor, of_tensor
from agff.model_card import model_card
from agff.objectives import name_of
from agff.processor import ItemProcessor
from agff.release_files import (
    BACKBONE_FOLDER,
    GOLDEN_FILE,
    PROMPTS_FILE,
    fill_head,
    read_tensor,
    settings_folder,
)
from agff.release_parts import lora_config, plain_backbone, release_parts
from agff.release_weights import WrittenWeights, write_weights
from agff.streamed_model import streamed
from agff.vocabulary_prompts import VocabularyPrompts, add_to_vocabulary

Lora = Literal["merged", "adapter", "both"]
"""What becomes of adapters: merged into the backbone, a folder of their own, or both."""
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
"""Between a golden vector, the checkpoint's own in float32, and the release's: 0.8 and 2.6 degrees.

Measured with 28 + 28 random layers: 1 - cosine is 1e-11 in float32 between AVX-512 and SSE; TF32, where a GPU
uses it, rounds 8 x finer than bfloat16, so about 5e-5; bfloat16 0.003, and such a model must be released in
float32. With the quickstart's 4 + 4 layers bfloat16 is at 0.0002.
"""


def save_release(
    embedder: Embedder,
    folder: Path,
    *,
    origin: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, LazyTensor] | None = None,
    lora: Lora = "merged",
    base_model: str | None = None,
    shard_bytes: int | None = None,
) -> list[WrittenWeights]:
    """Write a release, one tensor at a time; return the hashes of what was written (`check_written`).

    The golden vectors are the embedder's as it comes, in float32; the weights are rounded to `dtype`.
    origin: JSON values that say where the weights come from (run, step, backbone). weights: of a model that
    is without any (`agff.backbone.empty_backbone`), all of them by the names of its parameters. lora: what
    becomes of adapters, where there are any. base_model: the hub's name of the backbone they are of. Raises
    ConfigError where an adapter is asked for and the model has none, CheckpointError for one that is zero or
    of no layer.
    """
    model, processor = embedder.model, copy.deepcopy(embedder.processor)  # its tokenizer gets new tokens
    if lora != "merged" and lora_config(model) is None:
        raise ConfigError(
            f"--lora {lora}: the model has no adapters, all of its weights were trained; release it without "
            "--lora"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with streamed(model, weights, dtype=torch.float32) if weights else contextlib.nullcontext():
        golden = embedder.encode(list(golden_items().values()))
    save_file({"embeddings": golden}, folder / GOLDEN_FILE)
    parts = release_parts(model, weights or _in_memory(model))
    written = [write_weights(folder, parts.prompts, dtype=dtype, stem=Path(PROMPTS_FILE).stem)]
    if model.head is not None:
        written.append(write_weights(folder, parts.head, dtype=dtype, stem=Path(HEAD_FILE).stem))
    if lora != "merged":
        adapter = folder / ADAPTER_FOLDER
        written.append(write_adapter(adapter, model, parts, dtype=dtype, base_model=base_model))
    config, vocabulary = _released_config(model, dtype), None
    if lora != "adapter":
        if model.head is None:  # a head is code of ours, and without it these would be other vectors
            vocabulary = add_to_vocabulary(processor.tokenizer, config, processor.prompts)
            table, prompts = parts.backbone[parts.embedding], parts.prompts["vectors"]
            parts.backbone[parts.embedding] = _with_prompts(table, prompts, vocabulary)
        written.append(
            write_weights(folder / BACKBONE_FOLDER, parts.backbone, dtype=dtype, shard_bytes=shard_bytes)
        )
    config.save_pretrained(folder / settings_folder(lora))
    processor.save(folder / settings_folder(lora))
    if vocabulary is not None:
        write_ecosystem_files(folder, vocabulary, config, embedder.texts)
    known = {
        path.relative_to(folder).as_posix(): each.files[path.name]
        for each in written
        for path in each.tensors
    }
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
        weights="whole" if lora == "merged" else lora,
        base_model=base_model if lora != "merged" else None,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        origin=dict(origin),
        files=fingerprints(folder, known),
    )
    (folder / CARD_FILE).write_text(model_card(contract), encoding="utf-8")
    write_contract(folder, contract)
    return written


def _in_memory(model: EmbeddingModel) -> dict[str, LazyTensor]:
    return {name: of_tensor(parameter) for name, parameter in model.named_parameters()}


def _released_config(model: EmbeddingModel, dtype: torch.dtype) -> Any:
    backbone = plain_backbone(model)
    config = copy.deepcopy(backbone.config)
    config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(backbone).__name__]
    return config


def _with_prompts(table: LazyTensor, prompts: LazyTensor, vocabulary: VocabularyPrompts) -> LazyTensor:
    rows, width = table.shape
    shape = torch.Size((max(rows, vocabulary.vocabulary_size), width))
    return LazyTensor(shape, lambda: vocabulary.in_table(table.read(), prompts.read()))


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
