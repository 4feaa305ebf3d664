"""A release as the public harness mteb (2.26) evaluates it: `mteb.evaluate(MtebModel("release"), tasks)`.

Retrieval and reranking tasks compare by the fused similarity of all vectors, as launcher/evaluate.py does.
Every other task (pairs, STS, classification, clustering, zero-shot, bitext) computes with the array itself
and wants one vector an item: it gets the global one.

What an item's text becomes is what data_pipeline/layouts/mmeb_eval.py makes of the same cells. mteb states
the instruction as `task_metadata.prompt` (a text: of the queries; a dict: of "query" or "document") or as a
column `instruction`, which is the row's own:

    no instruction    the text is complete: MMEB's tables with `qry_text, tgt_text`
    an instruction    instruction and text are joined: MMEB's tables with `qry_inst, qry_text, ...`

An image without a text gets the release's own rule (`TextRule`), a document that is a text alone stays bare.

mteb ranks candidates of equal score by their ids, the larger string first, so a tie may be a hit. For us a
tie is a miss. Its CachedEmbeddingWrapper and its FAISS index hold one vector an item: they go with a release
of one vector, or `num_fine=0`, and refuse others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agff.batch import Item, TextRule, instructed_text, without_placeholder
from agff.contract import CONTRACT_FILE
from agff.embedder import as_item
from agff.errors import CheckpointError, ConfigError, DataError, all_or_errors
from agff.files import sha256_of
from agff.release import load

if TYPE_CHECKING:
    import numpy as np
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
    from mteb.types import Array, BatchedInput, PromptType

logger = logging.getLogger(__name__)

_COLUMNS = ("id", "text", "query", "title", "body", "instruction", "image")
_UNSEEN = ("audio", "video")
"""Columns of an item that the model cannot see."""


class MtebModel:
    """mteb's `EncoderProtocol` for a release folder. Needs the package mteb; nothing else of agff does."""

    def __init__(
        self,
        model_name: str | Path,
        revision: str | None = None,
        *,
        device: str | None = None,
        dim: int | None = None,
        num_fine: int | None = None,
        **meta: Any,
    ) -> None:
        """model_name: the release folder. revision: None, or the one that the folder must have.

        device: None takes the GPU where there is one. dim, num_fine: as in `Embedder.encode`. meta: what mteb
        shall know of the model and a release does not say, or says otherwise: fields of its `ModelMeta`, as
        name="organization/model", license="apache-2.0".

        Raises CheckpointError for a folder that is no whole release, ConfigError for another revision.
        """
        self.folder = Path(model_name)
        self.embedder = load(self.folder, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.revision = sha256_of(self.folder / CONTRACT_FILE)
        if revision not in (None, self.revision):
            raise ConfigError(f"{self.folder} has revision {self.revision}, not revision={revision}")
        self._sizes = {"dim": dim, "num_fine": num_fine}
        self._shape = self.embedder.encode([], dim=dim, num_fine=num_fine).shape[1:]
        self._meta = meta

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb records beside the scores. Its cache of results is keyed by the revision and `dim`,
        `num_fine`: the revision is the hash of the contract, which holds those of weights, prompts, tokenizer
        and image processor, and the limits, fusion and rule for texts."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        weights = self.embedder.model.state_dict().values()
        num_vectors, width = self._shape
        known = {
            "loader": None,
            "name": f"agff/{self.folder.resolve().name}",
            "revision": self.revision,
            "release_date": None,
            "languages": None,
            "n_parameters": sum(weight.numel() for weight in weights),
            "memory_usage_mb": sum(weight.nbytes for weight in weights) / 2**20,
            "max_tokens": self.embedder.processor.limits.max_tokens,
            "embed_dim": width,
            "license": None,
            "open_weights": None,
            "public_training_code": None,
            "public_training_data": None,
            "framework": ["PyTorch", "Transformers"],
            "similarity_fn_name": ScoringFunction.CUSTOM if num_vectors > 1 else ScoringFunction.COSINE,
            "use_instructions": True,
            "training_datasets": None,
            "modalities": ["text", "image"],
            "model_type": ["late-interaction" if num_vectors > 1 else "dense"],
            "experiment_kwargs": {k: v for k, v in self._sizes.items() if v is not None} or None,
        }
        return ModelMeta(**{**known, **self._meta})

    def encode(
        self,
        inputs: Iterable[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        precision: str = "float32",
    ) -> np.ndarray:
        """float32 unit vectors of all rows: (N, M, D) for a task of retrieval or reranking; the global ones
        alone, (N, D), for other tasks and where there are no others.

        inputs: batches of columns: text, image, instruction, id. Raises DataError, with the task and the
        row's id, for what cannot be embedded; ConfigError for audio, video or another precision.
        """
        if precision != "float32":
            raise ConfigError(f"precision={precision}: the vectors are float32; leave precision out")
        items = _items(inputs, self.embedder.texts, task_metadata, prompt_type)
        vectors_NMD = self.embedder.encode(
            items, **self._sizes, batch_size=batch_size, progress=show_progress_bar
        )
        if not bool(vectors_NMD.isfinite().all()):
            raise CheckpointError(f"{self.folder}: embeddings of {task_metadata.name} are not finite")
        if vectors_NMD.shape[1] > 1:
            if task_metadata.simplified_task_type == "retrieval":
                return vectors_NMD.numpy()
            logger.warning("%s compares one vector an item: the global ones", task_metadata.name)
        return vectors_NMD[:, 0].numpy()

    def similarity(self, embeddings1: Array, embeddings2: Array) -> Tensor:
        """(N, C) fused similarity on the CPU of what `encode` gave for N and C items."""
        return self.embedder.similarity(self._vectors(embeddings1), self._vectors(embeddings2)).cpu()

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> Tensor:
        """(N,) fused similarity on the CPU of the items i and i."""
        first_NMD, second_NMD = self._vectors(embeddings1), self._vectors(embeddings2)
        if first_NMD.shape != second_NMD.shape:
            raise ValueError(f"expected equal shapes, got {first_NMD.shape} and {second_NMD.shape}")
        pairs = zip(first_NMD.split(1), second_NMD.split(1), strict=True)
        return torch.cat([self.embedder.similarity(*pair)[0] for pair in pairs]).cpu()

    def _vectors(self, embeddings: Array) -> Tensor:
        """(N, M, D) of (N, M, D), of (N, D), or of one item's (D,), as mteb's tasks hand them over."""
        vectors = torch.as_tensor(embeddings, device=self.embedder.device)
        if vectors.ndim < 3:
            vectors = vectors.reshape(-1, 1, vectors.shape[-1])
        return vectors


def _items(
    inputs: Iterable[BatchedInput], texts: TextRule, task: TaskMetadata, prompt_type: PromptType | None
) -> Iterator[Item]:
    """The rows as items, batch by batch."""
    role = str(prompt_type or "item")
    instruction = _instruction(task.prompt, role)

    def item(row: Mapping[str, Any]) -> Item:
        return _item(row, instruction, texts, role=role, address=f"{task.name}, {role} {row['id']}")

    number = 0
    for batch in inputs:
        if unseen := [name for name in _UNSEEN if name in batch]:
            raise ConfigError(
                f"{task.name} has {' and '.join(unseen)}, the model sees text and images only; leave the "
                "task out"
            )
        rows = list(_rows(batch, first=number))
        number += len(rows)
        yield from all_or_errors(item, rows)


def _rows(batch: Mapping[str, Sequence[Any]], *, first: int) -> Iterator[dict[str, Any]]:
    """The batch row by row; where it has no ids, rows are counted."""
    columns = {name: batch[name] for name in _COLUMNS if name in batch}
    for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
        yield {"id": number, **dict(zip(columns, values, strict=True))}


def _instruction(prompt: str | Mapping[str, str] | None, role: str) -> str | None:
    """What the task says of a side; None where it says nothing."""
    if isinstance(prompt, Mapping):
        return prompt.get(role)
    return prompt if role == "query" else None


def _own_text(row: Mapping[str, Any]) -> str:
    """The text as the data set has it: in `text` mteb puts a query before its instruction, and strips a
    document of the line break that ends a complete text; it keeps the original beside it. A document's title
    is part of its text."""
    if "query" in row:
        return row["query"]
    return row["text"] if row.get("title") else row.get("body", row.get("text", ""))


def _item(
    row: Mapping[str, Any], instruction: str | None, texts: TextRule, *, role: str, address: str
) -> Item:
    text, image = _own_text(row), row.get("image")
    if row.get("instruction") is not None:
        instruction = row["instruction"]
    if instruction is not None:
        text = instructed_text(
            instruction, text, is_query=role == "query" or image is not None, has_image=False
        )
    if image is not None:
        return as_item({"text": text, "image": image}, texts, address=address)
    if "image" in row and not text.strip():
        raise DataError(f"{address}: neither text nor image; the task's data set lacks them")
    # an empty text is embedded: public corpora hold some, and every document must have its place
    return Item(text=without_placeholder(text), address=address)
