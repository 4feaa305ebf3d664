"""`python -m tests.ecosystem.write_mteb_release OUT`: OUT/release, a release of random weights, and
OUT/mmeb_eval, drawings in MMEB-eval's layout. Run by the environment that has this project's dependencies."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from agff.backbone import load_backbone
from agff.embedder import Embedder
from agff.embedding_model import EmbeddingModel
from agff.nested import Truncations
from agff.processor import ItemProcessor, ProcessorConfig
from agff.prompts import PromptConfig
from agff.release_writer import save_release
from agff.similarity import FusionConfig
from tests.drawings import tiny_backbone, write_drawings

PROMPTS = PromptConfig(num_fine=2)
MAX_TOKENS = 40


def write(out: Path) -> None:
    write_drawings(out)
    backbone = tiny_backbone(out / "backbone")
    torch.manual_seed(0)
    processor = ItemProcessor.from_folder(
        backbone, prompts=PROMPTS, limits=ProcessorConfig(max_tokens=MAX_TOKENS)
    )
    model = EmbeddingModel(load_backbone(backbone, dtype=torch.float32, attention="sdpa"), PROMPTS)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.normal_(parameter, std=0.1)  # similarities differ enough for hits and misses
    truncations = Truncations(dims=[8], fine=[0])
    save_release(
        Embedder(model, processor, FusionConfig(), truncations=truncations), out / "release", origin={}
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
