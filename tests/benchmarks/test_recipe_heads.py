"""The heads' formulas against torch's counter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agff.objectives.mm_gem_head import MmGemHead
from agff.objectives.vein import MaskedReconstruction
from agff.pooled_rows import CAPTION_LENGTH, ROW_KIND, RowKind
from agff.regions import ImageCells, mean_cells
from agff.vision import IMAGE_TOKENS
from tests.agff.objectives import mm_gem_case
from tests.agff.test_flops import Counter
from tests.agff.tiny import IMAGE_TOKEN, VOCABULARY, batch_of, chunk, global_rows
from tests.benchmarks.recipe_heads import decoder_flops, mm_gem_flops

HIDDEN = 16


def counted(outputs: Any) -> tuple[int, int]:
    """(forward without a graph, forward and backward) of what makes tensors."""
    with Counter() as forward, torch.no_grad():
        outputs()
    with Counter() as both:
        sum((each * torch.rand_like(each)).sum() for each in outputs()).backward()
    return forward.get_total_flops(), both.get_total_flops()


def test_the_decoder_of_vein() -> None:
    torch.manual_seed(0)
    head = MaskedReconstruction(
        hidden_size=HIDDEN,
        vocabulary_size=VOCABULARY,
        image_token_id=IMAGE_TOKEN,
        num_states=2,
        mask_ratio=0.25,
        dropout=0.1,
    )
    inputs = chunk([[3, 4, 5, 6, 7, 8, 9], [7], [8, 9]], [None, torch.ones(4, 96), None], 0)
    num_rows, length = inputs["input_ids"].shape
    states = [torch.randn(num_rows, length, HIDDEN, requires_grad=True) for _ in range(2)]

    def outputs() -> list[Tensor]:
        return [head(states, inputs, torch.zeros(num_rows, 1, HIDDEN))["reconstruction"]]

    expected = decoder_flops(
        HIDDEN, num_rows=2 * num_rows, num_inputs=1 + max(1, int(0.25 * length)), num_memory=length
    )
    assert counted(outputs) == (expected.forward, expected.forward + expected.backward)


def test_the_head_of_mm_gem() -> None:
    head = MmGemHead(HIDDEN, VOCABULARY, ImageCells(side=2, region_side=1), temperature=0.5)
    (inputs,) = mm_gem_case.prepared(
        batch_of(global_rows(4, 0, rows_without_image=range(2, 4)), 12, 0)
    ).chunks
    num_rows = len(inputs["input_ids"])
    inputs[ROW_KIND] = torch.where(inputs[ROW_KIND] == RowKind.REGION, RowKind.IMAGE, inputs[ROW_KIND])
    maps = [torch.randn(2, 2, HIDDEN, requires_grad=True) for _ in range(2)]
    state_BTH = torch.randn(*inputs["input_ids"].shape, HIDDEN, requires_grad=True)

    def outputs() -> list[Tensor]:
        pooled = head.with_image_tokens(inputs, maps)
        found = head([state_BTH], pooled, torch.zeros(num_rows, 1, HIDDEN))
        return [pooled[IMAGE_TOKENS], found["embedding"], found["caption_nll"]]

    expected = mm_gem_flops(
        HIDDEN,
        VOCABULARY,
        num_rows=num_rows,
        num_cells=8,
        num_prefix=8,
        num_caption=int(inputs[CAPTION_LENGTH].sum()),
    )
    with Counter() as counter:
        for each in (*maps, head.pool.positions, head.pool.positions):
            mean_cells(each, 2, 2)
    means = counter.get_total_flops()
    assert counted(outputs) == (
        expected.forward + means,
        expected.forward + expected.backward + expected.recomputed + 2 * means,
    )
