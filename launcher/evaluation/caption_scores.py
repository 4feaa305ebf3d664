"""Scoring caption sets: retrieval both ways and choices between two captions, by the fused similarity and by
the global vectors alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from agff.embedder import Embedder
from agff.recall import ChoiceScore, RecallScore, choice_score, places_in_blocks, recall_score
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.sugarcrepe import ChoiceSet


def views(items_NMD: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name of the similarity, the vectors it compares): `fused`, then `global`; the latter alone of a model
    without fine vectors, where both are the same."""
    if items_NMD.shape[1] > 1:
        yield "fused", items_NMD
    yield "global", items_NMD[:, :1]


def score_captions(model: Embedder, captions: CaptionSet, items_NMD: Tensor) -> list[RecallScore]:
    """R@k of both directions, from the embeddings of the set's items.

    Text to image: a query for each caption, right is its own image. Image to text: a query for each image,
    right is each of its captions.
    """
    images, texts = captions.images, captions.texts
    own_texts: dict[int, set[int]] = {image: set() for image in images}
    for text, image in captions.captions:
        own_texts[image].add(text)
    scores = []
    for similarity, vectors_NMD in views(items_NMD):
        to_image = direction_score(
            model,
            vectors_NMD,
            queries=[text for text, _ in captions.captions],
            candidates=images,
            own=[{image} for _, image in captions.captions],
            direction="text to image",
            similarity=similarity,
            num_left_out=captions.num_captions_left_out,
        )
        to_text = direction_score(
            model,
            vectors_NMD,
            queries=images,
            candidates=texts,
            own=list(own_texts.values()),
            direction="image to text",
            similarity=similarity,
            num_left_out=captions.num_images_left_out,
        )
        scores += [to_image, to_text]
    return scores


def direction_score(
    model: Embedder,
    vectors_NMD: Tensor,
    *,
    queries: Sequence[int],
    candidates: Sequence[int],
    own: Sequence[Collection[int]],
    direction: str,
    similarity: str,
    num_left_out: int,
) -> RecallScore:
    """R@k of queries among candidates; all are rows of `vectors_NMD`, own: the right candidates of each
    query. Similarities are computed block by block."""
    candidates_CMD = vectors_NMD[list(candidates)]
    column = {item: number for number, item in enumerate(candidates)}

    def similarity_of(rows: slice) -> Tensor:
        return model.similarity(vectors_NMD[list(queries[rows])], candidates_CMD)

    places = places_in_blocks(
        similarity_of, [[column[item] for item in items] for items in own], num_candidates=len(candidates)
    )
    return recall_score(
        places,
        [len(items) for items in own],
        direction=direction,
        similarity=similarity,
        num_candidates=len(candidates),
        num_queries_left_out=num_left_out,
    )


def score_choices(model: Embedder, choices: ChoiceSet, items_NMD: Tensor) -> list[ChoiceScore]:
    """The score of each subset, from the embeddings of the set's items."""
    scores = []
    for similarity, vectors_NMD in views(items_NMD):
        own_P, negative_P = _caption_similarities(model, choices, vectors_NMD)
        for subset in dict.fromkeys(choice.subset for choice in choices.choices):
            rows = [row for row, choice in enumerate(choices.choices) if choice.subset == subset]
            num_left_out = sum(choice.subset == subset for choice in choices.left_out)
            scores.append(
                choice_score(
                    own_P[rows],
                    negative_P[rows],
                    subset=subset,
                    similarity=similarity,
                    num_pairs_left_out=num_left_out,
                )
            )
    return scores


def _caption_similarities(model: Embedder, choices: ChoiceSet, vectors_NMD: Tensor) -> tuple[Tensor, Tensor]:
    """((P,), (P,)) similarities of each image to its caption and to its negative."""
    similarity_P2 = torch.stack(
        [
            model.similarity(vectors_NMD[[choice.image]], vectors_NMD[[choice.caption, choice.negative]])[0]
            for choice in choices.choices
        ]
    ).cpu()
    return similarity_P2[:, 0], similarity_P2[:, 1]
