from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from PIL import Image

from agff.batch import Item
from agff.errors import ConfigError, DataError
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from tests.agff.tiny import tiny_model
from tests.drawings import tiny_backbone

PROMPTS = PromptConfig(num_fine=2, tokens_per_prompt=2)
IMAGE = Image.new("RGB", (56, 56), "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def processor(folder: Path) -> ItemProcessor:
    return ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig(max_tokens=40))


def test_image_is_where_the_placeholder_was_and_prompts_follow_the_content(
    processor: ItemProcessor,
) -> None:
    inputs = processor([Item(text="see <|image_1|>\na heart", image=IMAGE), Item(text="a heart")])
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    start = inputs["prompt_start_B"].tolist()
    first = inputs["input_ids"][0, : start[0] + 6].tolist()
    num_image_tokens = int(inputs["image_grid_thw"][0].prod()) // 4
    assert first == (
        processor.tokenize("see ")
        + [tokenizer.convert_tokens_to_ids("<|vision_start|>")]
        + [image_id] * num_image_tokens
        + [tokenizer.convert_tokens_to_ids("<|vision_end|>")]
        + processor.tokenize("\na heart")
        + list(range(512, 518))
    )
    assert inputs["input_ids"][0, start[0] : start[0] + 6].tolist() == list(range(512, 518))
    assert inputs["input_ids"][1, start[1] : start[1] + 6].tolist() == list(range(512, 518))


def test_a_chunk_of_texts_carries_a_blank_image_behind_the_prompts_of_its_shortest_row(
    processor: ItemProcessor,
) -> None:
    inputs = processor([Item(text="a heart"), Item(text="a much longer text about a heart")])
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    blank = inputs["input_ids"] == image_id
    assert blank.sum() == int(inputs["image_grid_thw"].prod()) // 4
    rows, places = blank.nonzero(as_tuple=True)
    assert set(rows.tolist()) == {0}
    assert places.min() >= inputs["prompt_start_B"][0] + PROMPTS.num_tokens
    assert (inputs["pixel_values"] == inputs["pixel_values"][0]).all()


def test_special_tokens_spelled_out_in_a_text_are_text(processor: ItemProcessor) -> None:
    start = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert start not in processor.tokenize("a <|vision_start|> b")


def test_a_long_text_loses_its_end_and_an_image_is_never_cut(processor: ItemProcessor) -> None:
    inputs = processor([Item(text="<|image_1|>\n" + "a red heart " * 50, image=IMAGE)])
    assert inputs["prompt_start_B"].tolist() == [40 - PROMPTS.num_tokens]
    num_image_tokens = (inputs["input_ids"] == processor.image_token_id).sum()
    assert num_image_tokens == int(inputs["image_grid_thw"][0].prod()) // 4
    large = ItemProcessor(
        processor.tokenizer,
        processor.image_processor,
        tiny_config(processor),
        PROMPTS,
        ProcessorConfig(max_tokens=40, max_pixels=280 * 280),
    )
    with pytest.raises(DataError, match=r"image of \(280, 280\) pixels needs .* lower processor.max_pixels"):
        large([Item(text="<|image_1|>", image=IMAGE.resize((280, 280)))])


def test_an_image_that_the_image_processor_refuses_is_a_fault_of_the_data(processor: ItemProcessor) -> None:
    thin = Item(text="<|image_1|>", image=Image.new("RGB", (2000, 4)))
    for refuses in (lambda: processor([thin]), lambda: processor.num_tokens(thin)):
        with pytest.raises(
            DataError, match=r"refuses the image: absolute aspect ratio must be smaller than 200"
        ):
            refuses()


def tiny_config(processor: ItemProcessor) -> object:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(processor.tokenizer.name_or_path)


def test_each_item_that_the_backbone_cannot_take_is_named(processor: ItemProcessor) -> None:
    turned = IMAGE.copy()
    turned.getexif()[0x0112] = 6
    cases = {
        "a": (
            Item(text="<|image_pad|>", address="a"),
            r"holds the backbone's own image token <\|image_pad\|>",
        ),
        "b": (
            Item(text="<|image_1|>", image=Image.new("RGB", (2000, 4)), address="b"),
            "refuses the image: absolute aspect ratio must be smaller than 200",
        ),
        "c": (
            Item(text="<|image_1|>", image=IMAGE.convert("RGBA"), address="c"),
            r"mode RGBA, .* as agff.images.open_image makes it",
        ),
        "d": (Item(text="<|image_1|>", image=turned, address="d"), "an orientation to apply"),
    }
    fine = Item(text="a heart", address="fine")
    for address, (item, message) in cases.items():
        with pytest.raises(DataError, match=f"^{address}: .*{message}"):
            processor([fine, item])
    with pytest.raises(DataError, match=r"^c: ") as caught:
        processor([cases["c"][0], fine, cases["d"][0]])
    assert [line[:3] for line in str(caught.value).splitlines()] == ["c: ", "d: "]


def test_not_a_backbone_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a backbone folder"):
        ItemProcessor.from_folder(tmp_path, prompts=PROMPTS, limits=ProcessorConfig())


def test_text_only_chunks_give_the_vision_tower_an_exactly_zero_gradient() -> None:
    from tests.agff.tiny import batch_of, global_rows

    model = tiny_model(2)
    batch = batch_of(global_rows(3, 2, rows_without_image=range(3)), 3, 2)
    first_BMD, second_BMD = (model(batch.chunks[0])["embedding"] for _ in range(2))
    first_BMD.square().mean().mul(3).add(second_BMD.sum()).backward()
    vision = [p.grad for name, p in model.named_parameters() if "visual" in name]
    assert vision
    assert all(gradient is not None and (gradient == 0).all() for gradient in vision)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_damaged_file_of_the_backbone_is_an_error_of_the_folder(
    folder: Path, tmp_path: Path, name: str, content: str
) -> None:
    """Or harmless; whatever the libraries stumble over is no error of ours."""
    shutil.copytree(folder, tmp_path / "backbone")
    (tmp_path / "backbone" / name).write_text(content)
    with contextlib.suppress(ConfigError):
        ItemProcessor.from_folder(tmp_path / "backbone", prompts=PROMPTS, limits=ProcessorConfig())
