"""Items -> distinct rows -> chunks."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.collate import Chunking, FixedRows, TokenBudget

CHUNKINGS = st.one_of(
    st.builds(FixedRows, rows=st.integers(1, 40)), st.builds(TokenBudget, max_tokens=st.integers(40, 200))
)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=30), chunking=CHUNKINGS)
def test_every_row_is_in_one_chunk_and_the_longest_come_first(lengths: list[int], chunking: Chunking) -> None:
    chunks = chunking.cut(lengths)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(lengths)))
    assert all(chunks)
    for first, second in itertools.pairwise(chunks):
        assert max(lengths[i] for i in second) <= min(lengths[i] for i in first)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), rows=st.integers(1, 40))
def test_the_number_of_chunks_of_fixed_rows_follows_from_the_number_of_rows(
    lengths: list[int], rows: int
) -> None:
    chunks = FixedRows(rows=rows).cut(lengths)
    assert len(chunks) == -(-len(lengths) // rows)
    assert all(len(chunk) == rows for chunk in chunks[:-1])


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), budget=st.integers(40, 200))
def test_a_token_budget_holds_for_every_chunk_whose_padding_is_less_than_half(
    lengths: list[int], budget: int
) -> None:
    chunks = TokenBudget(max_tokens=budget).cut(lengths)
    longest = [max(lengths[i] for i in chunk) for chunk in chunks]
    for most, chunk in zip(longest, chunks, strict=True):
        assert len(chunk) * most <= budget
        assert 2 * min(lengths[i] for i in chunk) >= most
    for (most, following), chunk in zip(itertools.pairwise(longest), chunks[:-1], strict=True):
        assert (len(chunk) + 1) * most > budget or 2 * following < most, "as many as fit"
