"""Recall against the exhaustive fused search, which is computed block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agff.errors import DataError
from launcher.embedding.vectors_folder import VectorsFolder
from launcher.searching import recall, vector_blocks
from launcher.searching.build import IndexChoice
from launcher.searching.recall import Recall, exhaustive_scores, measure_recall, query_rows, recall_table
from launcher.searching.searcher import Searcher
from tests.launcher.searching.vectors import built, random_vectors, slow_scores, write_vectors


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    root = tmp_path_factory.mktemp("recall")
    vectors = write_vectors(root / "vectors", random_vectors(40))
    return Searcher(built(vectors, root / "index", IndexChoice(with_fine=True)))


@pytest.mark.parametrize("own_rows", [None, [3, 17, 39]], ids=["other queries", "queries of the corpus"])
def test_blocks_give_what_a_plain_loop_gives(
    searcher: Searcher, own_rows: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_blocks, "BLOCK_BYTES", 7 * 3 * 16 * 4)  # 7 items
    monkeypatch.setattr(recall, "QUERY_BLOCK", 2)
    corpus_NMD = random_vectors(40)
    query_QMD = corpus_NMD[own_rows] if own_rows else random_vectors(3, seed=1)
    expected = torch.stack([slow_scores(query_MD, corpus_NMD) for query_MD in query_QMD])
    for place, row in enumerate(own_rows or ()):
        expected[place, row] = -torch.inf
    found_Qk = exhaustive_scores(query_QMD, searcher.vectors, 9, own_rows=own_rows)
    torch.testing.assert_close(found_Qk.double(), expected.topk(9).values, atol=1e-6, rtol=0)


def slow_recall(k: int, factor: int) -> float:
    """Of the 40 items, each among the others, by the global vectors."""
    corpus_NMD, found = random_vectors(40), 0
    for row, query_MD in enumerate(corpus_NMD):
        scores_N, dots_N = slow_scores(query_MD, corpus_NMD), corpus_NMD[:, 0] @ query_MD[0]
        scores_N[row] = dots_N[row] = -torch.inf
        candidates = set(dots_N.topk(min(39, k * factor)).indices.tolist())
        found += len(candidates & set(scores_N.topk(k).indices.tolist()))
    return 100 * found / (k * 40)


def test_recall_is_the_share_of_the_best_that_are_among_the_candidates(searcher: Searcher) -> None:
    found = measure_recall(searcher, None, num_queries=40, k=3)
    assert [(each.with_fine, each.factor) for each in found] == [
        (with_fine, factor) for with_fine in (False, True) for factor in (1, 4, 16)
    ]
    by_global, by_every = found[:3], found[3:]
    assert [each.recall for each in by_global] == pytest.approx([slow_recall(3, x) for x in (1, 4, 16)])
    assert [each.num_candidates for each in by_global] == [3, 12, 39]
    assert by_global[0].recall < by_global[1].recall < by_global[2].recall == 100
    assert by_every[0].recall > by_global[0].recall


def test_queries_of_another_folder_may_find_their_equals(searcher: Searcher, tmp_path: Path) -> None:
    queries = VectorsFolder(write_vectors(tmp_path / "queries", random_vectors(40)[:5]))
    found = measure_recall(searcher, queries, num_queries=100, k=40)
    assert [each.recall for each in found] == [100] * 6
    assert found[0].num_candidates == 40


def test_queries_that_are_not_finite_are_refused(searcher: Searcher, tmp_path: Path) -> None:
    query_QMD = random_vectors(5)
    query_QMD[3, 1, 0] = torch.nan
    queries = VectorsFolder(write_vectors(tmp_path / "queries", query_QMD))
    with pytest.raises(DataError, match=r"queries: the vectors of item 'item 3' \(row 3\) hold NaN"):
        measure_recall(searcher, queries, num_queries=100, k=4)


def test_of_equal_items_any_will_do(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors", random_vectors(1).repeat(30, 1, 1))
    searcher = Searcher(built(vectors, tmp_path / "index", IndexChoice()))
    assert [each.recall for each in measure_recall(searcher, None, num_queries=5, k=3)] == [100] * 3


def test_queries_are_spread_evenly() -> None:
    assert query_rows(100, 4) == [0, 25, 50, 75]
    assert query_rows(3, 10) == [0, 1, 2]


def test_the_table_says_what_each_recall_cost() -> None:
    rows = [
        Recall(factor=4, with_fine=False, recall=87.25, num_candidates=40),
        Recall(factor=1, with_fine=True, recall=100, num_candidates=31.5),
    ]
    assert recall_table(rows, num_items=400).splitlines()[2:] == [
        "| the global vector | 4 | 40.0 (10.0%) | 87.2 % |",
        "| every vector | 1 | 31.5 (7.9%) | 100.0 % |",
    ]
