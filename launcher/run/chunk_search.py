"""`batch.chunk_size: auto` and `backbone.gradient_checkpointing: auto`: what fits into the memory of every
rank, tried before the first step and written into the run folder.

How a batch is cut into chunks does not change what is computed, but for rounding; so a run that is continued
takes what was found at its start.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from agff.batch import Batch, Item, ProcessItems
from agff.collectives import gather_objects, max_over_ranks, rank
from agff.engine import Engine
from agff.errors import CheckpointError, TrainingError
from agff.files import write_text
from agff.step import train_step
from data_pipeline.collate import Chunking, TokenBudget, pair_data_of
from data_pipeline.loader import StepBatches
from launcher.run.config import ResolvedRun

CHUNK_FILE = "chunk.json"
LOOKED_AT_STEPS = 4
"""First steps whose largest item is tried."""
USABLE_MEMORY = 0.9
"""Share of a GPU's memory that a try may use: later steps fragment it."""


@dataclass(frozen=True, kw_only=True)
class FoundChunk:
    """What fits, as CHUNK_FILE stores it."""

    rows: int
    """Copies of the largest item at once."""
    tokens: int
    """Of that item."""
    gradient_checkpointing: bool

    def applied_to(self, run: ResolvedRun) -> ResolvedRun:
        """The run with this in place of "auto". All items of a rank are one chunk where they fit; else a
        chunk has as many tokens as were tried."""
        chunking: Chunking = run.chunking
        if run.config.batch.chunk_size == "auto" and self.rows < run.most_items:
            chunking = TokenBudget(max_tokens=self.rows * self.tokens)
        backbone = dataclasses.replace(
            run.config.backbone, gradient_checkpointing=self.gradient_checkpointing
        )
        config = dataclasses.replace(run.config, backbone=backbone)
        return dataclasses.replace(run, config=config, chunking=chunking)


def resolve_chunks(
    run: ResolvedRun,
    batches: StepBatches,
    build: Callable[[ResolvedRun], Engine],
) -> ResolvedRun:
    """The run with what fits in place of "auto"; from the run folder if it was found before. Collective.

    build: an engine for a run; every try gets a new one, since running out of memory leaves it in any state.
    The next engine's FeatureMemory forgets the peak of the tries.
    All ranks try the same item, the largest of the first steps, with the same limit, so that they run out of
    memory at the same place: a rank that stops alone leaves the others waiting in a collective.

    Raises TrainingError when not even one item fits.
    """
    if not run.is_searched:
        return run
    path = run.run_dir / CHUNK_FILE
    found = gather_objects(_read(path) if rank() == 0 else None)[0]
    if found is None:
        with _limited_memory():
            found = _search(run, batches, build)
        if rank() == 0:
            write_text(path, json.dumps(asdict(found), indent=1) + "\n")
    return found.applied_to(run)


def largest_that_fits(num_items: int, fits: Callable[[int], bool]) -> int | None:
    """The first of num_items, half of it, a quarter, ... 1 that fits; None when not even one does."""
    rows = num_items
    while rows and not fits(rows):
        rows //= 2
    return rows or None


def _search(
    run: ResolvedRun,
    batches: StepBatches,
    build: Callable[[ResolvedRun], Engine],
) -> FoundChunk:
    first, *others = (batches.examples(step) for step in range(LOOKED_AT_STEPS))
    items = (item for examples in (first, *others) for example in examples for item in example.items)
    largest, pair_data = _largest_item(items, batches.process), pair_data_of(first)
    tokens = batches.process.num_tokens(largest)

    def fits(rows: int, checkpointing: bool) -> bool:
        tried = FoundChunk(rows=rows, tokens=tokens, gradient_checkpointing=checkpointing).applied_to(run)
        return _fits(build(tried), run, _copies(largest, rows, run, batches.process, pair_data))

    wanted = run.config.backbone.gradient_checkpointing
    if run.config.batch.chunk_size == "auto":
        rows = largest_that_fits(run.most_items, lambda rows: fits(rows, wanted is not False))
        if rows is None:
            raise TrainingError(_nothing_fits(largest, tokens)).shared()
    elif isinstance(run.chunking, TokenBudget):
        rows = max(1, run.chunking.max_tokens // tokens)
    else:
        rows = min(run.chunking.rows, run.most_items)
    checkpointing = not fits(rows, False) if wanted == "auto" else wanted
    return FoundChunk(rows=rows, tokens=tokens, gradient_checkpointing=checkpointing)


def _largest_item(items: Iterable[Item], process: ProcessItems) -> Item:
    """The item with the most tokens of any rank, the same on all of them. Collective."""
    own = max(items, key=process.num_tokens)
    return max(gather_objects(own), key=process.num_tokens)


def _copies(
    item: Item, rows: int, run: ResolvedRun, process: ProcessItems, pair_data: Mapping[str, Tensor]
) -> Batch:
    """A local batch whose chunks are copies: the one that keeps its graph, and as many as pass 1 joins."""
    num_chunks = 1 if rows >= run.most_items else 1 + run.config.batch.first_pass_chunks
    num_pairs, num_rows = run.local_batch_size, rows * num_chunks
    copies = [_copy(item, number) for number in range(num_rows)]
    return Batch(
        chunks=tuple(process(copies[start : start + rows]) for start in range(0, num_rows, rows)),
        row_of_item_R=torch.arange(run.most_items) % num_rows,
        query_ids_B=torch.arange(num_pairs),
        target_ids_B=torch.arange(num_pairs) + num_pairs,
        negative_ids_N=torch.arange(run.most_items - 2 * num_pairs) + 2 * num_pairs,
        addresses=(item.address,) * num_pairs,
        filler=process([Item(text="")]),
        pair_data=pair_data,
    )


def _copy(item: Item, number: int) -> Item:
    """With an image of its own: equal ones would be encoded once."""
    if item.image is None:
        return item
    image = item.image.copy()
    image.paste(Image.new("RGB", (1, 1), (number % 256, number // 256 % 256, number // 256**2)))
    return dataclasses.replace(item, image=image)


def _fits(engine: Engine, run: ResolvedRun, batch: Batch) -> bool:
    """Whether every rank gets through a whole step with the batch. Collective; the engine is used up."""
    device, is_out_of_memory = engine.device, False
    try:
        train_step(engine, run.config.loss, run.config.fusion, batch.to(device))
    except torch.OutOfMemoryError:
        is_out_of_memory = True
    # behind the handler, whose traceback holds the activations
    engine.deepspeed.destroy()
    del engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return not max_over_ranks([is_out_of_memory], device=device)[0]


@contextmanager
def _limited_memory() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_per_process_memory_fraction(USABLE_MEMORY)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _nothing_fits(item: Item, tokens: int) -> str:
    size = f", image of {item.image.width} x {item.image.height} pixels" if item.image is not None else ""
    return (
        f"batch.chunk_size=auto: not even one item fits into the memory of every rank: {item.address}, "
        f"{tokens} tokens{size}; lower processor.max_tokens or processor.max_pixels, train with "
        "backbone.lora, or use more ranks or ds_configs/zero3_offload.json"
    )


def _read(path: Path) -> FoundChunk | None:
    """What was found before; None when nothing was. Raises CheckpointError for a file that is not ours."""
    try:
        return FoundChunk(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not what this program writes: {error}; remove it, and what fits is tried again"
        ) from None
