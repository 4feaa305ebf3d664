"""Rows of a model that pools images: as many image tokens as cells, then prompts, then the caption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from agff.backbone import BackboneConfig
from agff.batch import IMAGE_PLACEHOLDER, Item
from agff.errors import ConfigError, DataError
from agff.flops import ModelFlops
from agff.pooled_rows import RowKind, places_of_images
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.regions import ImageCells
from agff.shared_images import FEATURE_ROWS, IMAGE_IDS
from tests.agff.family_folders import BUILDERS
from tests.agff.test_families import item

PROMPTS = PromptConfig(num_fine=0, tokens_per_prompt=2)
CELLS = ImageCells(side=3, region_side=2)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_onevision")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families") / request.param
    BUILDERS[request.param](path)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2_vl")
    BUILDERS["qwen2_vl"](path)
    return path


def processor_of(folder: Path, max_tokens: int = 64, cells: ImageCells | None = CELLS) -> ItemProcessor:
    limits = ProcessorConfig(max_tokens=max_tokens)
    return ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=limits, cells=cells)


def about(image: Item, **changes: object) -> Item:
    return dataclasses.replace(image, **changes)  # type: ignore[arg-type]


WIDE = item("what?", 112, 56)  # 4 x 2 tokens of Qwen2-VL
ITEMS = [
    about(WIDE, caption="a red heart"),
    item("a heart"),
    about(WIDE, box=(28.0, 14.0, 84.0, 56.0), caption="a star"),
    item("", 56, 112),
]


def test_a_row_holds_cells_then_prompts_then_the_caption_and_its_end(folder: Path) -> None:
    processor = processor_of(folder)
    inputs = processor(ITEMS)
    tokens = inputs["input_ids"]
    family_cells = [4, 4, 4] if folder.name == "llava_onevision" else [6, 4, 6]  # its base view is 2 x 2
    is_image = tokens == processor.image_token_id
    assert is_image.sum(dim=1).tolist() == [family_cells[0], 0, family_cells[1], family_cells[2]]
    for row, each in enumerate(ITEMS):
        start = int(inputs["caption_start_B"][row])
        prompts = tokens[row, start - 2 : start].tolist()
        assert prompts == processor._prompt_ids
        assert inputs["prompt_start_B"][row] == start - 2
        length = int(inputs["caption_length_B"][row])
        caption = processor.tokenize(each.caption)
        end = [processor.tokenizer.eos_token_id] if each.caption else []
        assert tokens[row, start : start + length].tolist() == [*caption, *end]
        assert processor.num_tokens(each) == start + length
    assert inputs["row_kind_B"].tolist() == [RowKind.IMAGE, RowKind.TEXT, RowKind.REGION, RowKind.IMAGE]
    assert len(inputs[IMAGE_IDS]) == 2, "an image of two rows is there once"
    assert FEATURE_ROWS not in inputs
    assert places_of_images(inputs) == [0, 0, 0, 1]
    shares = [[0, 0, 1, 1], [0, 0, 1, 1], [0.25, 0.25, 0.75, 1], [0, 0, 1, 1]]
    torch.testing.assert_close(inputs["box_B4"], torch.tensor(shares))


def test_floating_point_operations_count_captions(folder: Path) -> None:
    from transformers import AutoConfig

    backbone = BackboneConfig(path=str(folder))
    flops = ModelFlops.of_config(
        AutoConfig.from_pretrained(folder), backbone, PROMPTS, first_pass_chunks=1, keeps_vision=False
    )
    shape, processor = flops.shape(processor_of(folder)(ITEMS)), processor_of(folder)
    assert shape.lengths == tuple(processor.num_tokens(each) for each in ITEMS)
    views = [len(image) for image in shape.images]
    assert views == [1, 1], "of LLaVA-OneVision the base view alone"


def test_positions_follow_the_pooled_grid(qwen: Path) -> None:
    inputs = processor_of(qwen)([WIDE, ITEMS[2]])
    image = inputs["input_ids"] == processor_of(qwen).image_token_id
    whole, region = (inputs["position_ids"][row][:, image[row]] for row in range(2))
    assert (whole - whole[0, 0])[1:].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert (region - region[0, 0])[1:].tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]


def test_a_chunk_of_texts_carries_a_blank_image_that_is_no_rows_own(folder: Path) -> None:
    inputs = processor_of(folder)([item("a heart and a star"), item("one")])
    assert inputs["row_kind_B"].tolist() == [RowKind.TEXT, RowKind.BLANK]
    assert places_of_images(inputs) == [0, 0]
    assert int(inputs["row_image_ids_B"][1]) == int(inputs[IMAGE_IDS][0])
    is_image = inputs["input_ids"] == processor_of(folder).image_token_id
    assert is_image.sum(dim=1).tolist() == [0, 4], "2 x 2 cells behind the prompts"


def test_only_the_base_view_of_llava_is_made(tmp_path: Path) -> None:
    BUILDERS["llava_onevision"](tmp_path)
    views = [len(processor_of(tmp_path, 600, cells)([WIDE])["pixel_values"]) for cells in (CELLS, None)]
    assert views[0] == 1 < views[1]


@pytest.mark.parametrize("max_tokens", [16, 20, 64])
def test_a_caption_is_never_cut(qwen: Path, max_tokens: int) -> None:
    """The text before it is, as always."""
    long = about(item("what is that? " * 20, 112, 56), caption="two")
    processor = processor_of(qwen, max_tokens)
    assert processor.num_tokens(long) == max_tokens
    start, length = (int(processor([long])[name]) for name in ("caption_start_B", "caption_length_B"))
    assert (start + length, length) == (max_tokens, len(processor.tokenize("two")) + 1)


BAD = {
    "a caption too long": (
        about(WIDE, caption="many words " * 20, address="shard.tar:7: query"),
        r"shard.tar:7: query: image of \(112, 56\) pixels needs 8 tokens and the prompts 2 and the caption, "
        r"with its end, \d+, more than processor.max_tokens=32; raise processor.max_tokens",
    ),
    "a caption without an image": (Item(text="a", caption="b"), "has a caption and no image"),
    "a region without an image": (Item(text="a", box=(0.0, 0.0, 1.0, 1.0)), "has a region and no image"),
    "a region outside": (about(WIDE, box=(0.0, 0.0, 113.0, 9.0)), "reaches outside of the image of 112 x 56"),
    "a region reversed": (about(WIDE, box=(9.0, 0.0, 3.0, 9.0)), "is reversed"),
    "a region without area": (about(WIDE, box=(3.0, 0.0, 3.0, 9.0)), "has no area"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_row_is_a_bad_sample(qwen: Path, name: str) -> None:
    bad, says = BAD[name]
    processor = processor_of(qwen, 32)
    with pytest.raises(DataError, match=says):
        processor([item("a heart"), bad])
    with pytest.raises(DataError, match=says):
        processor.num_tokens(bad)


def test_several_bad_items_are_all_named(qwen: Path) -> None:
    with pytest.raises(DataError) as caught:
        processor_of(qwen, 32)([bad for bad, _ in BAD.values()])
    assert len(str(caught.value).splitlines()) == len(BAD)


@pytest.mark.parametrize("changes", [{"box": (0.0, 0.0, 9.0, 9.0)}, {"caption": "b"}])
def test_a_model_that_does_not_pool_has_neither_regions_nor_captions(qwen: Path, changes: dict) -> None:
    with pytest.raises(DataError, match="which only an objective that pools images, as mm_gem, trains for"):
        processor_of(qwen, cells=None)([about(WIDE, **changes)])


def test_fine_prompts_and_a_tokenizer_without_an_end_are_refused(qwen: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts.num_fine=2: .* has one vector .* use prompts.num_fine=0"):
        ItemProcessor.from_folder(
            qwen, prompts=PromptConfig(num_fine=2), limits=ProcessorConfig(), cells=CELLS
        )
    good = processor_of(qwen)
    good.tokenizer.eos_token = None
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match="the tokenizer has no end of text"):
        ItemProcessor(
            good.tokenizer,
            good.image_processor,
            AutoConfig.from_pretrained(qwen),
            PROMPTS,
            ProcessorConfig(),
            cells=CELLS,
        )


def test_sizes_are_known_without_processing(folder: Path) -> None:
    """Of thin and small images too, whose maps have fewer cells on a side."""
    processor = processor_of(folder, 200)
    for width, height in ((56, 56), (300, 30), (30, 300), (100, 84), (500, 400)):
        image = Image.new("RGB", (width, height), "blue")
        each = Item(text=IMAGE_PLACEHOLDER, image=image)
        assert processor.num_tokens(each) == int(processor([each])["caption_start_B"][0])
