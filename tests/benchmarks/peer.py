"""The step of public trainers of multimodal embeddings, written from the papers: what ours is compared with.

GradCache (arXiv 2101.06983): encode all chunks without a graph, take the loss's gradient at the embeddings,
encode every chunk again and carry it into the parameters; DDP averages on the last chunk only. VLM2Vec (arXiv
2410.05160): the backbone's state at a row's last token, one normalised vector an item, InfoNCE over the
targets of all ranks. The gather passes no gradient to other ranks: each puts its own rows back in, computes
the loss of the whole global batch and multiplies it by their number, which DDP's mean takes out again.

The backbone is transformers' own, with padding mask, as a tutorial would load it. Where our rows end in soft
tokens these end in as many ordinary ones, so that both encode equally many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from agff.batch import Item
from agff.families import family_of
from agff.shared_images import FEATURE_ROWS
from tests.benchmarks.synthetic import PROMPTS, examples, processor_of
from tests.benchmarks.turns import Cases

TEMPERATURE = 0.02
Inputs = dict[str, Tensor]


def two_passes_over_ddp(folder: Path, num_pairs: int, num_chunks: int, lora_rank: int | None) -> Cases:
    """{"step": one optimizer step} of this rank's share of `num_pairs` pairs. Collective."""
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    if lora_rank:
        import peft

        targets_of_lora = family_of(backbone.config).lora_targets
        lora = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets_of_lora)
        backbone = peft.get_peft_model(backbone, lora)
    model = DistributedDataParallel(LastToken(backbone))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    own = examples(num_pairs)[dist.get_rank() :: dist.get_world_size()]
    rows = 2 * len(own) // num_chunks
    targets = _chunks(folder, [pair.target for pair in own], rows)
    queries = _chunks(folder, [pair.query for pair in own], rows)

    def step() -> None:
        accumulate(model, queries, targets)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"step": step}


class LastToken(nn.Module):
    """(B, D) normalised state at each row's last token."""

    def __init__(self, backbone: Callable[..., object]) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Inputs) -> Tensor:
        states_BTH = self.backbone(**inputs, use_cache=False).last_hidden_state
        last_B = inputs["attention_mask"].sum(dim=1) - 1
        rows_B = torch.arange(states_BTH.shape[0])
        return F.normalize(states_BTH[rows_B, last_B].float(), dim=-1)


def accumulate(model: DistributedDataParallel, queries: Sequence[Inputs], targets: Sequence[Inputs]) -> None:
    """The gradient of one step, averaged over the ranks. Collective."""
    chunks = [*queries, *targets]
    with torch.no_grad():
        leaves = [model.module(chunk) for chunk in chunks]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = global_info_nce(torch.cat(leaves[: len(queries)]), torch.cat(leaves[len(queries) :]))
    gradients = torch.autograd.grad(loss, leaves)
    for index, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True)):
        is_last = index == len(chunks) - 1
        with contextlib.nullcontext() if is_last else model.no_sync():
            (model(chunk) * gradient).sum().backward()


def global_info_nce(query_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Mean over all ranks' queries, times the number of ranks; gradient at this rank's rows only.
    Collective."""
    logits = _of_all_ranks(query_BD) @ _of_all_ranks(target_BD).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits))) * dist.get_world_size()


def _of_all_ranks(rows_BD: Tensor) -> Tensor:
    gathered = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows_BD.detach().contiguous())
    gathered[dist.get_rank()] = rows_BD
    return torch.cat(gathered)


def _chunks(folder: Path, items: Sequence[Item], rows: int) -> list[Inputs]:
    parts = [items[start : start + rows] for start in range(0, len(items), rows)]
    return [_inputs(folder, part) for part in parts]


def _inputs(folder: Path, items: Sequence[Item]) -> Inputs:
    """What transformers' processor makes of the items: ids, mask, patches and grids; one image a row."""
    process = processor_of(folder)
    own = process(items)
    assert FEATURE_ROWS not in own, "rows share an image, whose pixels are there once"
    ids, lengths = own["input_ids"].clone(), [process.num_tokens(item) for item in items]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        ids[row, length - PROMPTS.num_tokens : length] = torch.arange(PROMPTS.num_tokens)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == process.image_token_id).int(),
        "pixel_values": own["pixel_values"],
        "image_grid_thw": own["image_grid_thw"],
    }
