"""Retrieval examples for a person to look at: a text and its five best images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from agff.embedder import Embedder
from agff.errors import DataError
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.eval_items import EvalItem
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmeb_sets import SetInfo
from launcher.evaluation.scores import Encodes


def shown_set(benchmark: EvalSet | CaptionSet, count: int) -> EvalSet:
    """The set as lists of candidates; of a caption set `count` of its captions, each among all images."""
    if isinstance(benchmark, EvalSet):
        return benchmark
    num_captions = len(benchmark.captions)
    count = min(count, num_captions)
    shown = [benchmark.captions[index * num_captions // count] for index in range(count)]
    return EvalSet(
        name=benchmark.name,
        items=benchmark.items,
        addresses=benchmark.addresses,
        findings=benchmark.findings,
        info=SetInfo(meta_task="retrieval", in_distribution=False),
        queries=tuple(text for text, _ in shown),
        candidates=tuple(tuple(dict.fromkeys((image, *benchmark.images))) for _, image in shown),
    )


def retrieval_example(model: Embedder, eval_set: EvalSet, items_NMD: Tensor, row: int) -> str:
    """One query of a text-to-image set and its five best candidates, the truth marked."""
    candidates = eval_set.candidates[row]
    query = eval_set.queries[row]
    scores = model.similarity(items_NMD[[query]], items_NMD[list(candidates)])[0]
    best = _top_lines(eval_set, candidates, scores, truth=candidates[0])
    rank = 1 + int((scores[1:] >= scores[0]).sum())
    text = eval_set.items[query].text.strip()
    return f'{eval_set.name}: "{text}": truth at rank {rank} of {len(candidates)}\n{best}'


def free_text_example(model: Embedder, eval_set: EvalSet, text: str, encode: Encodes) -> str:
    """The five best images of a text-to-image set for your own text, phrased like the set's queries.
    Collective."""
    candidates = list(dict.fromkeys(item for row in eval_set.candidates for item in row))
    before, after = phrasing([eval_set.items[query].text for query in eval_set.queries])
    query = EvalItem(before + text + after)
    items = [query, *(eval_set.items[item] for item in candidates)]
    found = encode(items, title=eval_set.name)
    if found.refused:
        lines = [f"{eval_set.name}: items that cannot be used", *found.refused.values()]
        raise DataError("\n  ".join(lines)).shared()
    scores = model.similarity(found.vectors[:1], found.vectors[1:])[0]
    best = _top_lines(eval_set, candidates, scores, truth=None)
    return f'{eval_set.name}, {len(candidates)} candidates: "{query.text.strip()}"\n{best}'


def phrasing(texts: Sequence[str]) -> tuple[str, str]:
    """(instruction, ending) of a set's queries: the words all of them begin with, and the line break they end
    with."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    instruction = first[:length]
    while instruction and not instruction[-1].isspace():
        instruction = instruction[:-1]
    return instruction, "\n" if all(text.endswith("\n") for text in texts) else ""


def _top_lines(eval_set: EvalSet, candidates: Sequence[int], scores: Tensor, *, truth: int | None) -> str:
    best = scores.topk(min(5, len(candidates)))
    names = _names(eval_set)
    lines = []
    for place, (score, column) in enumerate(
        zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1
    ):
        item = candidates[column]
        mark = "  <- truth" if item == truth else ""
        lines.append(f"  {place}.  {score:+.3f}  {names[item]}{mark}")
    return "\n".join(lines)


def _names(eval_set: EvalSet) -> dict[int, str]:
    """Each candidate's file name and, where it is a query's truth, what that query asks for."""
    before, _ = phrasing([eval_set.items[query].text for query in eval_set.queries])
    asked = {
        candidates[0]: eval_set.items[query].text[len(before) :].strip()
        for query, candidates in zip(eval_set.queries, eval_set.candidates, strict=True)
    }
    names = {}
    for index, item in enumerate(eval_set.items):
        name = item.text
        if item.image is not None:
            name = Path(item.image.name).stem
        names[index] = f"{name} ({asked[index]})" if index in asked else name
    return names
