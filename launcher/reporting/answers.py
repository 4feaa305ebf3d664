"""How a model answers questions: its hardest mistakes, and what it holds to be near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agff.embedder import Embedder
from launcher.evaluation.questions import Asked, Question
from launcher.evaluation.scores import query_blocks, similarities_to_own


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong candidate that is at least as similar to the query as every right one. Rows of `Asked`."""

    query: int
    right: int
    """The most similar of the right ones."""
    wrong: int
    """The most similar of the others."""
    right_similarity: float
    wrong_similarity: float
    place: int
    """Of the right one, counted from 1; ties count against it."""
    num_candidates: int

    @property
    def margin(self) -> float:
        """How much more similar the wrong one is, >= 0."""
        return self.wrong_similarity - self.right_similarity


def mistakes_of(model: Embedder, asked: Asked) -> list[Mistake]:
    """All of a set, the hardest first: those with the largest margin."""
    found = [
        mistake
        for question, similarity_C in _answers(model, asked)
        if (mistake := _mistake(question, similarity_C)) is not None
    ]
    return sorted(found, key=lambda mistake: -mistake.margin)


def nearest(
    model: Embedder, asked: Asked, row: int, *, others: Sequence[int], count: int
) -> list[tuple[int, float]]:
    """(row, similarity) of the `count` of `others` that are nearest to a row, nearest first."""
    vectors_NMD = asked.vectors_NMD
    similarity_C = model.similarity(vectors_NMD[[row]], vectors_NMD[list(others)])[0].cpu()
    order = similarity_C.argsort(descending=True, stable=True)[:count].tolist()
    return [(others[place], similarity_C[place].item()) for place in order]


def _answers(model: Embedder, asked: Asked) -> Iterator[tuple[Question, Tensor]]:
    """(question, (C,) similarities of its candidates), in order."""
    vectors_NMD = asked.vectors_NMD
    all_candidates = [question.candidates for question in asked.questions]
    for rows, together in query_blocks(all_candidates):
        questions, candidates = asked.questions[rows], all_candidates[rows]
        queries = [question.query for question in questions]
        if together is None:
            for some, similarity_BC in similarities_to_own(model, vectors_NMD, queries, candidates):
                for question, row_C in zip(questions[some], similarity_BC.cpu(), strict=True):
                    yield question, row_C[: len(question.candidates)]
            continue
        similarity_BC = model.similarity(vectors_NMD[queries], vectors_NMD[together]).cpu()
        column_of = {row: column for column, row in enumerate(together)}
        for question, row_C in zip(questions, similarity_BC, strict=True):
            yield question, row_C[[column_of[row] for row in question.candidates]]


def _mistake(question: Question, similarity_C: Tensor) -> Mistake | None:
    right = set(question.right)
    is_right_C = torch.tensor([row in right for row in question.candidates])
    if bool(is_right_C.all()):  # every candidate has the same words
        return None
    own = int(similarity_C.masked_fill(~is_right_C, -torch.inf).argmax())
    other = int(similarity_C.masked_fill(is_right_C, -torch.inf).argmax())
    num_ahead = int(((similarity_C >= similarity_C[own]) & ~is_right_C).sum())
    if not num_ahead:
        return None
    return Mistake(
        query=question.query,
        right=question.candidates[own],
        wrong=question.candidates[other],
        right_similarity=similarity_C[own].item(),
        wrong_similarity=similarity_C[other].item(),
        place=1 + num_ahead,
        num_candidates=len(question.candidates),
    )
