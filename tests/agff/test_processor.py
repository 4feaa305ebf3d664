from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from agff.batch import Item
from agff.embedder import Embedder, as_item
from agff.errors import ConfigError, DataError
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.similarity import FusionConfig
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


def test_image_stands_where_the_placeholder_stood_and_prompts_follow_the_content(
    processor: ItemProcessor,
) -> None:
    inputs = processor([Item(text="see <|image_1|>\na heart", image=IMAGE), Item(text="a heart")])
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    first = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    num_image_tokens = int(inputs["image_grid_thw"][0].prod()) // 4
    assert first == (
        processor.tokenize("see ")
        + [tokenizer.convert_tokens_to_ids("<|vision_start|>")]
        + [image_id] * num_image_tokens
        + [tokenizer.convert_tokens_to_ids("<|vision_end|>")]
        + processor.tokenize("\na heart")
        + list(range(512, 518))
    )
    start = inputs["prompt_start_B"].tolist()
    assert inputs["input_ids"][0, start[0] : start[0] + 6].tolist() == list(range(512, 518))
    assert inputs["input_ids"][1, start[1] : start[1] + 6].tolist() == list(range(512, 518))
    assert torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == image_id)


def test_a_chunk_of_texts_carries_a_blank_image_that_nothing_attends_to(processor: ItemProcessor) -> None:
    inputs = processor([Item(text="a heart"), Item(text="a much longer text about a heart")])
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    blank = inputs["input_ids"] == image_id
    assert blank.sum() == int(inputs["image_grid_thw"].prod()) // 4
    assert not inputs["attention_mask"][blank].any()
    assert (inputs["pixel_values"] == inputs["pixel_values"][0]).all()


def test_special_tokens_spelled_out_in_a_text_are_text(processor: ItemProcessor) -> None:
    start = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert start not in processor.tokenize("a <|vision_start|> b")


def test_a_long_text_loses_its_end_and_an_image_is_never_cut(processor: ItemProcessor) -> None:
    inputs = processor([Item(text="<|image_1|>\n" + "a red heart " * 50, image=IMAGE)])
    assert inputs["attention_mask"].sum() == 40
    assert inputs["mm_token_type_ids"].sum() == int(inputs["image_grid_thw"][0].prod()) // 4
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


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            Item(text="no placeholder", image=IMAGE),
            "0 times, the item has an image; it must stand there exactly 1",
        ),
        (
            Item(text="<|image_1|> <|image_1|>", image=IMAGE),
            "2 times, the item has an image; it must stand there exactly 1",
        ),
        (Item(text="<|image_1|> alone"), "1 times, the item has no image; it must stand there exactly 0"),
        (Item(text="<|image_pad|>"), r"backbone's own image token <\|image_pad\|>; write <\|image_1\|>"),
    ],
)
def test_image_token_missing_duplicated_or_foreign(
    processor: ItemProcessor, item: Item, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        processor([item])


def test_not_a_backbone_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a backbone folder"):
        ItemProcessor.from_folder(tmp_path, prompts=PROMPTS, limits=ProcessorConfig())


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(folder: Path) -> None:
    from agff.backbone import load_backbone
    from agff.embedding_model import EmbeddingModel

    processor = ItemProcessor.from_folder(folder, prompts=PROMPTS, limits=ProcessorConfig())
    model = EmbeddingModel(load_backbone(folder, dtype=torch.float32, attention="sdpa"), PROMPTS)
    torch.nn.init.normal_(model.prompted_embedding.vectors)
    embedder = Embedder(model, processor, FusionConfig())
    items = [
        "a heart",
        IMAGE,
        {"text": "what is it?", "image": IMAGE},
        {"text": "<|image_1|>\nx", "image": IMAGE},
    ]
    together = embedder.encode(items, batch_size=4)
    assert together.shape == (4, 3, 32)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4, 3))
    alone = torch.cat([embedder.encode([item]) for item in items])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert embedder.similarity(together, together).shape == (4, 4)
    assert embedder.encode([]).shape == (0, 3, 32)
    before = embedder.weights_sha256
    torch.nn.init.zeros_(model.prompted_embedding.vectors)
    assert embedder.weights_sha256 != before


def test_what_encode_accepts(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    IMAGE.save(path)
    assert as_item("text") == Item(text="text")
    for image in (path, IMAGE, {"image": str(path)}, {"image": IMAGE.convert("RGBA"), "text": ""}):
        item = as_item(image)
        assert item.text == "<|image_1|>\n"
        assert item.image is not None
        assert item.image.mode == "RGB"
        assert item.image.getpixel((3, 3)) == (255, 0, 0)
    with pytest.raises(DataError, match="neither text nor image"):
        as_item({})
    with pytest.raises(DataError, match=r"keys \['picture'\]; known are text and image"):
        as_item({"picture": path})
    with pytest.raises(DataError, match="cannot read the image"):
        as_item(Path(__file__))
    with pytest.raises(DataError, match="found a int"):
        as_item({"image": 3})


def test_text_only_chunks_give_the_vision_tower_an_exactly_zero_gradient() -> None:
    from tests.agff.tiny import batch_of, global_rows

    model = tiny_model(2)
    batch = batch_of(global_rows(3, 2, rows_without_image=range(3)), 3, 2)
    model(batch.chunks[0]).square().mean().mul(3).add(model(batch.chunks[0]).sum()).backward()
    vision = [p.grad for name, p in model.named_parameters() if "visual" in name]
    assert vision
    assert all(gradient is not None and (gradient == 0).all() for gradient in vision)
