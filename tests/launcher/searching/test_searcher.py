"""Two stages find what the exhaustive fused search finds, as far as the candidates reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agff.errors import ConfigError, DataError
from agff.similarity import fused_similarity
from launcher.searching import searcher as searcher_module
from launcher.searching import vector_blocks
from launcher.searching.build import IndexChoice
from launcher.searching.faiss_part import KINDS, STORAGES, Kind, Storage
from launcher.searching.searcher import Searcher
from tests.launcher.searching.vectors import built, random_vectors, slow_scores, write_vectors


def searcher_of(folder: Path, vectors_NMD: torch.Tensor, choice: IndexChoice | None = None) -> Searcher:
    vectors = write_vectors(folder / "vectors", vectors_NMD)
    return Searcher(built(vectors, folder / "index", choice or IndexChoice()))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_items_as_candidates_it_is_the_exhaustive_fused_search(
    tmp_path: Path, kind: Kind, storage: Storage
) -> None:
    corpus_NMD = random_vectors(50)
    searcher = searcher_of(tmp_path, corpus_NMD, IndexChoice(kind=kind, storage=storage))
    for query_MD in random_vectors(4, seed=1):
        expected = slow_scores(query_MD, corpus_NMD).topk(5)
        hits = searcher.search(query_MD, k=5, factor=10)
        assert [hit.row for hit in hits] == expected.indices.tolist()
        found = torch.tensor([hit.score for hit in hits], dtype=torch.float64)
        torch.testing.assert_close(found, expected.values, atol=1e-6, rtol=0)  # float32


def test_an_item_near_in_one_fine_vector_alone_is_found_by_the_fine_vectors(tmp_path: Path) -> None:
    corpus_NMD, query_MD = random_vectors(50), random_vectors(1, seed=1)[0]
    hidden = int((corpus_NMD[:, 0] @ query_MD[0]).argmin())  # the last that the global vectors would find
    corpus_NMD[hidden, 2] = query_MD[1]
    assert slow_scores(query_MD, corpus_NMD).argmax() == hidden
    plain = searcher_of(tmp_path / "plain", corpus_NMD)
    searcher = searcher_of(tmp_path / "fine", corpus_NMD, IndexChoice(with_fine=True))
    assert plain.search(query_MD, k=1, factor=4)[0].row != hidden
    assert searcher.search(query_MD, k=1, factor=4)[0].row == hidden
    by_global, by_every = (set(searcher.candidates(query_MD, 4, with_fine=fine)) for fine in (False, True))
    assert by_global < by_every


def test_equal_items_come_in_the_order_of_their_rows(tmp_path: Path) -> None:
    corpus_NMD = random_vectors(1).repeat(320, 1, 1)
    hits = searcher_of(tmp_path, corpus_NMD).search(corpus_NMD[0], k=320, factor=1)
    assert [hit.row for hit in hits] == list(range(320))


def test_candidates_are_scored_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of an index may be candidates, and it may be larger than the memory."""
    monkeypatch.setattr(vector_blocks, "BLOCK_BYTES", 7 * 3 * 16 * 4)  # 7 items
    sizes: list[int] = []

    def counted(query_BMD: torch.Tensor, found_CMD: torch.Tensor, *, beta: float) -> torch.Tensor:
        sizes.append(len(found_CMD))
        return fused_similarity(query_BMD, found_CMD, beta=beta)

    monkeypatch.setattr(searcher_module, "fused_similarity", counted)
    corpus_NMD, query_MD = random_vectors(50), random_vectors(1, seed=1)[0]
    scores = searcher_of(tmp_path, corpus_NMD).score(query_MD, np.arange(50))
    assert sizes == [7] * 7 + [1]
    torch.testing.assert_close(scores.double(), slow_scores(query_MD, corpus_NMD), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_k_hits_whatever_the_kind(tmp_path: Path, kind: Kind) -> None:
    corpus_NMD = random_vectors(1_000, 2, 8)
    hits = searcher_of(tmp_path, corpus_NMD, IndexChoice(kind=kind)).search(corpus_NMD[0], k=900, factor=1)
    assert len({hit.row for hit in hits}) == 900


def test_a_query_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    query_MD = random_vectors(1)[0]
    query_MD[1, 2] = torch.nan
    with pytest.raises(DataError, match="release gives vectors of the query that are not finite"):
        searcher_of(tmp_path, random_vectors(50)).search(query_MD, k=1, factor=1)


def test_an_item_that_became_not_finite_is_no_hit(tmp_path: Path) -> None:
    """Of a large file the size alone is compared, and NaN would be the best score."""
    corpus_NMD = random_vectors(50)
    searcher = searcher_of(tmp_path, corpus_NMD)
    damaged_NMD = corpus_NMD.numpy().copy()
    damaged_NMD[7, 1] = np.nan
    searcher.vectors.vectors = damaged_NMD
    with pytest.raises(DataError, match=r"item 'item 7' \(row 7\) hold NaN or infinity"):
        searcher.search(corpus_NMD[7], k=3, factor=4)


def test_items_without_fine_vectors_are_searched_by_their_one_vector(tmp_path: Path) -> None:
    corpus_NMD = random_vectors(50, 1)
    (hit,) = searcher_of(tmp_path, corpus_NMD).search(corpus_NMD[7], k=1, factor=1)
    assert (hit.row, hit.score) == (7, pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize(
    ("k", "factor", "message"),
    [
        (51, 1, r"--k 51: .*index has 50 items; give at most that many"),
        (0, 1, r"--k 0, --factor 1: both must be >= 1"),
        (1, 0, r"--k 1, --factor 0: both must be >= 1"),
    ],
)
def test_what_the_index_cannot_give_is_refused(tmp_path: Path, k: int, factor: int, message: str) -> None:
    searcher = searcher_of(tmp_path, random_vectors(50))
    with pytest.raises(ConfigError, match=message):
        searcher.search(random_vectors(1)[0], k=k, factor=factor)


def test_as_many_as_there_are_can_be_asked_for(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path, random_vectors(50))
    hits = searcher.search(random_vectors(1, seed=1)[0], k=50, factor=16)
    assert sorted(hit.row for hit in hits) == list(range(50))
