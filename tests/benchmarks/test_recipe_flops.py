"""Real widths: the formulas against torch's counter without weights, and what a step may cost."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable
from agff.flops import ChunkShape, ModelFlops
from agff.prompts import PromptConfig
from tests.benchmarks.published import RECIPES, published_config
from tests.benchmarks.recipe_flops import bound, flops_rows, step_of_recipe, variant


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=16)])
def test_the_formula_equals_the_counter_at_the_widths_of_qwen2_vl_2b(lora: LoraConfig | None) -> None:
    """All layers on the meta device; tower and language model apart, since what joins them reads tensors."""
    model_config = published_config("Qwen2-VL-2B-Instruct")
    config = BackboneConfig(path="", lora=lora, attention="eager")
    with torch.device("meta"):
        backbone = choose_trainable(AutoModel.from_config(model_config, attn_implementation="eager"), config)
    num_rows, length, grid = 3, 500, (1, 20, 36)
    num_patches = grid[1] * grid[2]
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        features = backbone.visual(
            torch.empty(num_patches, 3 * 2 * 14 * 14),
            grid_thw=torch.tensor([grid], device="cpu"),
            cu_seqlens=torch.tensor([0, num_patches], device="cpu", dtype=torch.int32),
            position_ids=torch.empty(num_patches, 2),
        ).pooler_output
        if features.requires_grad:
            features.sum().backward()
        embedded = torch.empty(num_rows, length, model_config.text_config.hidden_size, requires_grad=True)
        hidden = backbone.language_model(
            inputs_embeds=embedded,
            position_ids=torch.empty(3, num_rows, length, dtype=torch.int64),
            use_cache=False,
        ).last_hidden_state
        hidden.sum().backward()
    flops = ModelFlops.of_config(
        model_config, config, PromptConfig(), keeps_vision=False, first_pass_chunks=1
    )
    shape = ChunkShape(
        num_rows=num_rows,
        padded_length=length,
        lengths=(length,) * num_rows,
        images=((grid,),),
        image_ids=(0,),
        has_real_images=True,
    )
    assert flops.pass_2(shape) == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("recipe", "choices", "limit"),
    [
        ("mmeb_qwen2vl_2b", {}, 1.10),
        ("mmeb_qwen2vl_2b", {"lora": None}, 1.05),
        ("mmeb_llava_ov_7b", {}, 1.05),
        ("mmeb_llava_ov_7b", {"freeze_vision": False}, 1.05),
    ],
)
def test_a_step_computes_little_that_is_not_needed(
    recipe: str, choices: dict[str, None], limit: float, checkpointing: bool
) -> None:
    """Padding and adapters included. LoRA's bound allows no recompute, so it holds without checkpointing."""
    config = variant(recipe, choices, checkpointing=checkpointing)
    ranks = step_of_recipe(config)
    executed = sum(rank.executed for rank in ranks)
    allowed = limit * sum(bound(config, rank) for rank in ranks)
    assert (executed <= allowed) == (config.backbone.lora is None or not checkpointing)
    assert sum(r.num_padded_tokens for r in ranks) <= 1.10 * sum(r.num_tokens for r in ranks)


def test_every_recipe_of_a_published_model_has_its_rows() -> None:
    rows = flops_rows()
    names = {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("quickstart")}
    assert {row.case.split(",")[0] for row in rows} == names
