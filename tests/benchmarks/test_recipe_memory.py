"""Memory by formula, where other numbers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.benchmarks.recipe_flops import RELATIVES, variant
from tests.benchmarks.recipe_memory import GPU_BYTES, memory_rows, num_parameters, rank_bytes


def test_every_relative_fits_on_its_gpus_with_a_checkpointed_chunk() -> None:
    rows = memory_rows()
    assert [row.case for row in rows] == list(RELATIVES)
    assert all(0 < row.ratio < 1 for row in rows)


def test_numbers_of_parameters_are_those_of_the_published_models() -> None:
    """Qwen2-VL-2B's checkpoint has 2,208,985,600 (its head is tied), 7B's 8,291,375,616 with a head of
    152,064 x 3,584; an adapter of rank 8 on seven matrices of 28 layers."""
    adapter = 28 * 8 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    total, trained = num_parameters(variant("fam_align", {}, checkpointing=True))
    assert (total, trained) == (2_208_985_600 + adapter + 1536, adapter + 1536)
    total, trained = num_parameters(variant("unime_stage2", {}, checkpointing=True))
    assert total - trained == 8_291_375_616 - 152_064 * 3584


def test_zero_stages_share_out_what_they_say() -> None:
    config = variant("mm_gem_stage1", {}, checkpointing=True)
    two, three = (rank_bytes(replace(config, deepspeed=name)) for name in ("zero2", "zero3"))
    assert two.optimizer == three.optimizer == 12 * two.num_trainable // 8
    assert two.weights == 2 * two.num_parameters
    assert three.weights == two.weights // 8 + 2 * 10**9, "and what is gathered"
    assert two.left < three.left < GPU_BYTES


@pytest.mark.parametrize("recipe", ["unime_stage2_llava_ov_7b"])
def test_where_a_chunk_needs_checkpointing(recipe: str) -> None:
    found = rank_bytes(variant(recipe, {}, checkpointing=True))
    assert found.chunk_checkpointed < found.left < found.chunk
