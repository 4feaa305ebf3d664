"""Every held-out pair is read, whatever the sizes of batches and sources."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data_pipeline.once_through import OnceThrough
from data_pipeline.plan import Mixture
from tests.data_pipeline.test_plan import manifest

SIZES = {"A": [7, 3, 9], "B": [8], "C": [4, 1]}


def plan(caps: int | None, global_batch_size: int) -> OnceThrough:
    mixture = Mixture(caps=caps, sub_batch_size=4)
    return OnceThrough(manifest(**SIZES), mixture, seed=3, global_batch_size=global_batch_size)


@pytest.mark.parametrize("caps", [None, 5])
@pytest.mark.parametrize("global_batch_size", [4, 8, 24, 64])
def test_every_kept_sample_is_there_and_what_comes_again_fills_up(
    caps: int | None, global_batch_size: int
) -> None:
    found = plan(caps, global_batch_size)
    rows = np.concatenate([found.global_batch(step) for step in range(found.num_steps)])
    assert len(rows) == found.num_steps * global_batch_size
    seen = Counter(map(tuple, rows.tolist()))
    per_source = Counter(source for source, _ in seen)
    kept = [min(sum(sizes), caps or 99) for sizes in SIZES.values()]
    assert per_source == dict(enumerate(kept)), "each source whole"
    filled_up = 4 * sum(-(-count // 4) for count in kept)
    assert len(rows) - filled_up < global_batch_size, "no step too many"
    if caps is None:
        assert set(seen) == {(s, n) for s, sizes in enumerate(SIZES.values()) for n in range(sum(sizes))}


def test_sub_batches_are_of_one_source_mixed_and_shared_out_among_the_ranks() -> None:
    found = plan(None, 8)
    sources = [found.global_batch(step)[:, 0].reshape(2, 4) for step in range(found.num_steps)]
    assert all((part == part[0]).all() for step in sources for part in step)
    assert any(step[0, 0] != step[1, 0] for step in sources)
    parts = [found.rank_rows(1, rank=rank, world_size=2) for rank in (0, 1)]
    assert np.array_equal(np.stack(parts, axis=1).reshape(8, 2), found.global_batch(1))


def test_weights_have_no_place_here() -> None:
    with pytest.raises(ValueError, match="here each comes once"):
        OnceThrough(
            manifest(**SIZES), Mixture(weights={"A": 1.0}, sub_batch_size=4), seed=0, global_batch_size=4
        )
