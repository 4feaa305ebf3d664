"""A Qwen2-VL small enough for many exact comparisons, loaded from a folder, and batches made by hand."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from agff.backbone import BackboneConfig, LoraConfig, choose_trainable, load_backbone
from agff.batch import Batch, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.families import family_of
from agff.family import Family
from agff.objectives.objective import Head
from agff.prompts import PromptConfig
from agff.shared_images import IMAGE_IDS
from data_pipeline.collate import FixedRows, TokenBudget
from tests.agff.family_folders import flat_qwen, write_published

VOCABULARY, IMAGE_TOKEN, PATCH_VALUES = 40, 30, 3 * 2 * 4 * 4


@cache
def tiny_folder() -> TemporaryDirectory[str]:
    """A Qwen2-VL in its published layout: hidden 16, 2 layers, vision 16 x 1, patch 4, merge 2.

    Written once in a process."""
    from transformers import AutoConfig, AutoModel

    config = flat_qwen(
        "qwen2_vl",
        text={
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 1,
            "patch_size": 4,
        },
        rope={"rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        tokens={
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 31,
            "vision_start_token_id": 32,
            "vision_end_token_id": 33,
        },
    )
    folder = TemporaryDirectory()
    (Path(folder.name) / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder.name), dtype=torch.float32)
    write_published(Path(folder.name), config, model.state_dict())
    return folder


@cache
def tiny_family() -> Family:
    from transformers import AutoConfig

    return family_of(AutoConfig.from_pretrained(tiny_folder().name))


def tiny_model(
    num_fine: int, *, lora: bool = False, seed: int = 0, head: Head | None = None
) -> EmbeddingModel:
    """The model of `tiny_folder` as training builds it, float32.

    lora: only adapters and soft tokens train."""
    backbone = load_backbone(Path(tiny_folder().name), dtype=torch.float32, attention="sdpa")
    config = BackboneConfig(path="", lora=LoraConfig(rank=2) if lora else None)
    model = EmbeddingModel(choose_trainable(backbone, config), PromptConfig(num_fine=num_fine), head)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.prompted_embedding.vectors, std=0.5)
    for parameter in model.parameters():  # far from zero, so that no gradient is small by accident
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def chunk(texts: list[list[int]], images: list[Tensor | None], num_fine: int) -> ModelInputs:
    """Inputs as ItemProcessor builds them: [image] text prompts, right padding, a blank image behind the
    prompts when there is none."""
    prompts = list(range(VOCABULARY, VOCABULARY + 1 + num_fine))
    rows = [
        ([IMAGE_TOKEN] if image is not None else []) + text + prompts
        for text, image in zip(texts, images, strict=True)
    ]
    starts = [len(row) - len(prompts) for row in rows]
    pixels = [image for image in images if image is not None]
    if not pixels:
        shortest = starts.index(min(starts))
        rows[shortest], pixels = [*rows[shortest], IMAGE_TOKEN], [torch.zeros(4, PATCH_VALUES)]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
    grids = torch.tensor([[1, 2, 2]] * len(pixels))
    return {
        "input_ids": input_ids,
        "prompt_start_B": torch.tensor(starts),
        **tiny_family().index(
            input_ids == IMAGE_TOKEN,
            {"pixel_values": torch.cat(pixels), "image_grid_thw": grids},
            range(len(pixels)),
        ),
        IMAGE_IDS: torch.tensor([zlib.crc32(image.numpy().tobytes()) for image in pixels]),
    }


def global_rows(num_rows: int, num_fine: int, *, rows_without_image: range, seed: int = 0) -> list[dict]:
    """Pairs (image + text query, text target); rows in `rows_without_image` have a text-only query.

    Rows 0 and 2 share an image. Rows 0, 1 and 3 have an explicit negative; that of row 3 is row 1's target,
    so for row 1 it is none.
    """
    generator = torch.Generator().manual_seed(seed)

    def text() -> list[int]:
        length = int(torch.randint(1, 5, (1,), generator=generator))
        return torch.randint(0, 30, (length,), generator=generator).tolist()

    rows: list[dict] = []
    for index in range(num_rows):
        image = torch.randn(4, PATCH_VALUES, generator=generator)
        rows.append(
            {
                "query": (text(), None if index in rows_without_image else image),
                "target": (text(), None),
                "query_id": index,
                "target_id": 100 + index % (num_rows - 1),  # the first and the last row share a target
            }
        )
    if num_rows > 2 and 0 not in rows_without_image and 2 not in rows_without_image:
        rows[2]["query"] = (rows[2]["query"][0], rows[0]["query"][1])
    for index in (0, 1):
        rows[index] |= {"negative": (text(), None), "negative_id": 200 + index}
    if num_rows > 3:
        rows[3] |= {"negative": rows[1]["target"], "negative_id": rows[1]["target_id"]}
    return rows


def batch_of(rows: list[dict], chunking: int | TokenBudget, num_fine: int) -> Batch:
    """The rows as one rank's batch, in chunks of this many items or tokens."""
    with_negative = [row for row in rows if "negative" in row]
    items = [
        row[side]
        for side, of in (("query", rows), ("target", rows), ("negative", with_negative))
        for row in of
    ]
    cut = FixedRows(rows=chunking) if isinstance(chunking, int) else chunking
    parts = cut.cut([len(text) + (image is not None) + 1 + num_fine for text, image in items])
    order = [index for part in parts for index in part]
    return Batch(
        chunks=tuple(
            chunk([items[i][0] for i in part], [items[i][1] for i in part], num_fine) for part in parts
        ),
        row_of_item_R=torch.tensor([order.index(i) for i in range(len(items))]),
        query_ids_B=torch.tensor([row["query_id"] for row in rows]),
        target_ids_B=torch.tensor([row["target_id"] for row in rows]),
        negative_ids_N=torch.tensor([row["negative_id"] for row in with_negative], dtype=torch.int64),
        addresses=tuple(f"rows:{row['query_id']}" for row in rows),
        filler=chunk([[]], [None], num_fine),
    )
