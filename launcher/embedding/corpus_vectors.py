"""The work of all ranks: the items of a corpus -> a folder of all their vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from agff.embedder import Embedder
from data_pipeline.corpora.corpus import Corpus, CorpusItem, Unusable
from data_pipeline.layouts.eval_items import EvalItem
from launcher.embedding.taken_folder import taken
from launcher.embedding.teacher import num_cut
from launcher.embedding.vectors_folder import Description, VectorItem, settings_of
from launcher.embedding.vectors_folder_writer import EncodedBlock, VectorsFolderWriter
from launcher.encoding.items import length_of
from launcher.encoding.loading import loaded_batches, outline
from launcher.encoding.vector_cache import inputs_key
from launcher.run.meeting import from_first_rank, together
from launcher.run.ranks import RankInfo

SPAN = 8
"""Blocks whose items are known at once: worker processes start once for these."""


@dataclass(frozen=True, kw_only=True)
class HowToEncode:
    """Choices of a person."""

    batch_size: int
    """Items in a forward; other batches round otherwise."""
    dtype: str
    """Of the file."""
    num_workers: int
    """Processes of a rank that load while the model computes."""


def describe(
    embedder: Embedder, corpus: Corpus, how: HowToEncode, *, model: Path, location: str
) -> Description:
    """What is known before the work. Encodes one item."""
    _, num_vectors, dim = embedder.encode("a").shape
    return Description(
        model=str(model),
        weights_sha256=embedder.weights_sha256,
        settings=settings_of_work(embedder, how),
        fusion={"beta": embedder.fusion.beta},
        input=location if "://" in location else str(Path(location).absolute()),
        input_fingerprint=corpus.fingerprint,
        num_items=0,
        num_vectors=num_vectors,
        dim=dim,
        dtype=how.dtype,
        num_rejected=0,
        num_cut=0,
        files={},
    )


def settings_of_work(embedder: Embedder, how: HowToEncode) -> dict[str, Any]:
    """In which a work that is continued must agree: also the tokenizer and image processor, by a hash that
    another version of transformers may change, so that finished vectors are not refused for it."""
    return {
        **settings_of(embedder),
        "batch_size": how.batch_size,
        "tokenizer_and_images": inputs_key(embedder),
    }


def write_corpus_vectors(
    embedder: Embedder,
    corpus: Corpus,
    out: Path,
    description: Description,
    how: HowToEncode,
    rank: RankInfo,
    *,
    title: str,
) -> Description:
    """Write the folder, or continue it; what it holds. Another process that writes it is waited for.

    title: of the bar of its own items that rank 0 shows. Collective: every rank must call it. Raises
    AgffError on all ranks.
    """
    writer = VectorsFolderWriter(out, description, num_input=corpus.num_items)
    with taken(out, rank):
        from_first_rank(writer.begin)

        def work() -> None:
            num_left = _num_items(writer.missing_blocks(rank=0, world_size=1))
            if rank.rank == 0 and 0 < num_left < corpus.num_items:
                tqdm.write(
                    f"continues: {corpus.num_items - num_left:,} of {corpus.num_items:,} items are done"
                )
            blocks = writer.missing_blocks(rank=rank.rank, world_size=rank.world_size)
            with tqdm(total=_num_items(blocks), desc=title, unit="item", disable=rank.rank > 0) as bar:
                for start in range(0, len(blocks), SPAN):
                    span = blocks[start : start + SPAN]
                    for block, encoded in zip(span, _encoded(embedder, corpus, span, how), strict=True):
                        writer.write(block, encoded)
                        bar.update(len(block))

        together(work)
        done = from_first_rank(writer.finish)
        from_first_rank(writer.clean_up)
    return done


def _num_items(blocks: Sequence[range]) -> int:
    return sum(map(len, blocks))


def _encoded(
    embedder: Embedder, corpus: Corpus, blocks: Sequence[range], how: HowToEncode
) -> Iterator[EncodedBlock]:
    """Each block's items. Batches are cut from one block, so what shares a batch does not depend on who has
    which blocks."""
    found = {place: entry for block in blocks for place, entry in _read(corpus, block)}
    items = {
        place: EvalItem(_text(embedder, entry), entry.image)
        for place, entry in found.items()
        if isinstance(entry, CorpusItem)
    }
    order = list(items)
    length = {place: length_of(embedder, item) for place, item in items.items()}
    batches_of = [_batches(length, block, how.batch_size) for block in blocks]
    position = {place: number for number, place in enumerate(order)}
    loaded = loaded_batches(
        embedder.processor,
        list(items.values()),
        [[position[place] for place in batch] for batches in batches_of for batch in batches],
        num_workers=how.num_workers,
    )
    with contextlib.closing(loaded):
        for block, batches in zip(blocks, batches_of, strict=True):
            vectors: dict[int, np.ndarray] = {}
            refused = {place: entry for place in block if isinstance(entry := found[place], Unusable)}
            for _ in batches:
                batch = next(loaded)
                for number, reason in batch.refused.items():
                    place = order[number]
                    refused[place] = Unusable(id=found[place].id, reason=reason)
                if batch.positions:
                    vectors_NMD = embedder.encode_inputs(batch.inputs).cpu().numpy()
                    vectors |= zip((order[number] for number in batch.positions), vectors_NMD, strict=True)
            usable = sorted(vectors)
            most = embedder.processor.limits.max_tokens
            yield EncodedBlock(
                vectors_NMD=np.stack([vectors[place] for place in usable])
                if usable
                else np.empty((0, *embedder.encode([]).shape[1:]), np.float32),
                items=[_described(found[place]) for place in usable],
                rejected=sorted(refused.items()),
                num_cut=num_cut(embedder, [outline(items[x]) for x in usable if length[x] >= most]),
            )


def _read(corpus: Corpus, block: range) -> Iterator[tuple[int, CorpusItem | Unusable]]:
    return zip(block, corpus.read(block.start, block.stop), strict=True)


def _text(embedder: Embedder, item: CorpusItem) -> str:
    """Complete, by the model's rule."""
    text = item.text or ""
    return text if item.image is None else embedder.texts.beside_image(text)


def _batches(length: Mapping[int, int], block: range, batch_size: int) -> list[list[int]]:
    """The block's usable places, the longest first, in batches."""
    order = sorted((x for x in block if x in length), key=lambda place: (-length[place], place))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _described(entry: CorpusItem | Unusable) -> VectorItem:
    assert isinstance(entry, CorpusItem), "what has a vector"
    return VectorItem(id=entry.id, text=entry.text, image=entry.image_name)
