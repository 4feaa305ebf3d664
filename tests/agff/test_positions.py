"""What the loader's workers compute, against what transformers' models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agff.families import family_of
from agff.joined import join_chunks
from tests.agff.family_folders import BUILDERS, backbone_arguments
from tests.agff.test_families import CHUNKS, QWEN, our_model, padding_mask, processor_of

PADDED = ("input_ids", "position_ids")
"""The tensors with an axis of tokens, their last."""


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("positions") / request.param
    BUILDERS[request.param](path)
    return path


def model_without_weights(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("folder", QWEN, indirect=True)
def test_positions_of_tokens_equal_those_of_transformers(folder: Path, chunk: str) -> None:
    """Where the mask is 1; those of padding are used nowhere."""
    processor = processor_of(folder)
    inputs = processor(CHUNKS[chunk])
    mask = padding_mask(inputs)
    has_image = any(item.image for item in CHUNKS[chunk])
    expected, _ = model_without_weights(folder).get_rope_index(
        inputs["input_ids"],
        (inputs["input_ids"] == processor.image_token_id).int(),
        image_grid_thw=inputs["image_grid_thw"] if has_image else None,
        attention_mask=mask,
    )
    positions = inputs["position_ids"].transpose(0, 1)
    assert torch.equal(positions.masked_fill(mask == 0, 0), expected)
    if has_image:
        assert not torch.equal(positions[0], positions[1])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("folder", QWEN, indirect=True)
def test_indices_of_images_equal_those_of_transformers(folder: Path, chunk: str) -> None:
    """They are what its towers would compute from the grid alone."""
    from transformers import vision_utils

    processor = processor_of(folder)
    inputs = processor(CHUNKS[chunk])
    arguments = backbone_arguments(processor.family, inputs)
    grid, tower = inputs["image_grid_thw"], model_without_weights(folder).visual
    cu_seqlens = vision_utils.get_vision_cu_seqlens(grid)
    expected = {
        "image_position_ids": vision_utils.get_vision_position_ids(grid, tower.spatial_merge_size),
        "image_cu_seqlens": cu_seqlens,
        "image_max_seqlen": int(cu_seqlens.diff().max()),
    }
    segments = [cu_seqlens]
    if folder.name == "qwen2_5_vl":
        index, cu_window_seqlens = vision_utils.get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        expected |= {
            "image_window_index": index,
            "image_cu_window_seqlens": cu_window_seqlens,
            "image_max_window_seqlen": int(cu_window_seqlens.diff().max()),
        }
        segments.append(cu_window_seqlens)
    if folder.name == "qwen3_vl":
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        expected |= {"image_interp_indices": indices, "image_interp_weights": weights}
    assert [list(s.lengths) for s in arguments.pop("image_segments")] == [s.diff().tolist() for s in segments]
    given = {name for name in arguments if name.startswith("image_")} - {"image_grid_thw"}
    assert given == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert arguments[name].dtype == value.dtype, name
            assert torch.equal(arguments[name], value), name
        else:
            assert arguments[name] == value, name


def test_chunks_are_joined_axis_by_axis(folder: Path) -> None:
    """The rows of several chunks, a blank image among them, give what each chunk gives alone."""
    processor, model = processor_of(folder), our_model(folder, torch.float64)
    chunks = [processor(items) for items in CHUNKS.values()]
    with torch.no_grad():
        together = model(join_chunks(chunks, model.family))["embedding"]
        alone = torch.cat([model(chunk)["embedding"] for chunk in chunks])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("folder", QWEN, indirect=True)
def test_sizes_of_towers_come_from_the_configuration(folder: Path) -> None:
    """Windows of 112 pixels, tokens of 28; a table of 16 entries."""
    family = family_of(model_without_weights(folder).config)
    expected = {"qwen2_vl": (None, None), "qwen2_5_vl": (4, None), "qwen3_vl": (None, 4)}
    assert (family.window_size, family.table_size) == expected[folder.name]
