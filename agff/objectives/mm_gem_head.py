"""MM-GEM's head: it pools an image into a grid of cells, from which come the image's vector and the prefix of
its caption.

The paper (arXiv 2405.19333) describes these parts in words alone; shapes, initial values and the sigmoid of
the temperature are our definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agff.backbone_folder import language_model_head
from agff.batch import Encoded, ModelInputs
from agff.errors import ConfigError
from agff.objectives.objective import Head
from agff.pooled_rows import BOX, CAPTION_LENGTH, CAPTION_START, ROW_KIND, RowKind, places_of_images
from agff.regions import ImageCells, mean_cells, roi_align
from agff.vision import IMAGE_TOKENS

IMAGE_CELL = "image_cell_BH"
"""Input that the head gives itself: the one cell of each row's image or region."""
LOGITS_AT_ONCE = 2**24
"""Elements of the (tokens, vocabulary) matrix that exist at a time: 64 MiB in float32."""
LOWEST, HIGHEST = 0.01, 1.0
"""Of the learned temperature."""


class PoolAggregator(nn.Module):
    """What makes cells of the means over a map's cells: a two-layer MLP of their LayerNorm beside them, and
    learned positions.

    The MLP's last layer starts at zero, so that an untrained cell is about the mean of the backbone's own
    tokens. One tensor in for all images and one out: ZeRO-3 notes each tensor of a module in its trace. With
    one for each image the traces of the ranks would differ, and they would wait for each other for ever."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.mlp = ResidualMlp(width)
        self.positions = nn.Parameter(torch.randn(side, side, width) * 0.02)

    def forward(self, means_NH: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(N, H) of all images' cells. sizes: (rows, columns) of each image; positions of a smaller grid are
        means of those of the whole."""
        positions_NH = torch.cat([mean_cells(self.positions, *size).flatten(0, 1) for size in sizes])
        return self.mlp(means_NH) + positions_NH.to(means_NH.dtype)


class ResidualMlp(nn.Module):
    """x + MLP(LayerNorm(x)), x in the beginning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = _linear(width), _linear(width)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) of (..., H)."""
        return x + self.outer(nn.functional.gelu(self.inner(self.norm(x))))


def _linear(width: int) -> nn.Linear:
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.bias)
    return linear


class NextToken(nn.Module):
    """The language model's head."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocabulary, width))

    def forward(self, states_NH: Tensor, labels_N: Tensor) -> Tensor:
        """(N,) float32 negative log-likelihoods of the labels, LOGITS_AT_ONCE at a time: a block's logits are
        computed again in the backward pass."""
        block = max(1, LOGITS_AT_ONCE // len(self.weight))
        parts = zip(states_NH.split(block), labels_N.split(block), strict=True)
        return torch.cat(
            [checkpoint(self._block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def logits(self, states: Tensor) -> Tensor:
        """(..., vocabulary) of (..., H)."""
        return states @ self.weight.T

    def _block(self, states_NH: Tensor, labels_N: Tensor) -> Tensor:
        logits_NV = self.logits(states_NH)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        return nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")


class MmGemHead(Head):
    """Outputs: "embedding" (B, 1, D), of an image or region h1(its one cell), of a text h3(state at the last
    soft token); "caption_nll" (B,), summed over the caption's tokens; "caption_tokens" (B,); "temperature"
    (B,)."""

    is_released = True

    def __init__(self, width: int, vocabulary: int, cells: ImageCells, *, temperature: float) -> None:
        super().__init__()
        self.image_cells = self.cells = cells
        self.pool = PoolAggregator(width, cells.side)
        self.h1, self.h2, self.h3 = _linear(width), ResidualMlp(width), _linear(width)
        self.lm_head = NextToken(vocabulary, width)
        share = (math.log(temperature) - math.log(LOWEST)) / (math.log(HIGHEST) - math.log(LOWEST))
        self.temperature_logit = nn.Parameter(torch.tensor([math.log(share / (1 - share))]))

    def load_from(self, backbone: Path, backbone_config: Any) -> None:
        """The language model's head of that folder. Raises ConfigError where there is none that fits."""
        found = language_model_head(backbone, backbone_config)
        if found.shape != self.lm_head.weight.shape:
            raise ConfigError(
                f"{backbone}: its language-model head (lm_head.weight) is {list(found.shape)}, must be "
                f"{list(self.lm_head.weight.shape)}, vocabulary and width of its config.json: they are of "
                "another model; download the folder again"
            )
        self.lm_head.load_state_dict({"weight": found})

    def with_image_tokens(self, inputs: ModelInputs, maps: Sequence[Tensor]) -> ModelInputs:
        """See Head. A region is aligned on its image's cells, by as many samples as it has cells, so that the
        region of a whole image is the mean of its cells."""
        grids = self.grids(maps)
        kinds, places = inputs[ROW_KIND].tolist(), places_of_images(inputs)
        one_cell = [grid.mean(dim=(0, 1)) for grid in grids]
        cells_BH = [one_cell[place] for place in places]
        prefixes = {row: grids[place].flatten(0, 1) for row, place in enumerate(places) if kinds[row]}
        for place, grid in enumerate(grids):
            rows = [row for row, kind in enumerate(kinds) if kind == RowKind.REGION and places[row] == place]
            if rows:
                cell_NH, prefix_NPH = self._regions(grid, inputs[BOX][rows])
                for row, cell_H, prefix_PH in zip(rows, cell_NH, prefix_NPH, strict=True):
                    cells_BH[row], prefixes[row] = cell_H, prefix_PH
        tokens_NH = self.h2(torch.cat([prefixes[row] for row in sorted(prefixes)]))
        return {**inputs, IMAGE_TOKENS: tokens_NH, IMAGE_CELL: torch.stack(cells_BH)}

    def forward(self, states: Sequence[Tensor], inputs: ModelInputs, embedding_BMD: Tensor) -> Encoded:
        """See Head."""
        state_BTH = states[-1]
        rows_B = torch.arange(len(state_BTH), device=state_BTH.device)
        text_BH = self.h3(state_BTH[rows_B, inputs[CAPTION_START] - 1])
        is_image_B = (inputs[ROW_KIND] % RowKind.BLANK > 0).to(state_BTH.device)  # 1 and 2 of 0 to 3
        vector_BH = torch.where(is_image_B[:, None], self.h1(inputs[IMAGE_CELL]).to(text_BH), text_BH)
        vector_BH = vector_BH.to(torch.promote_types(vector_BH.dtype, torch.float32))
        share = torch.sigmoid(self.temperature_logit.to(vector_BH.dtype))
        low, high = math.log(LOWEST), math.log(HIGHEST)
        return {
            "embedding": nn.functional.normalize(vector_BH, dim=-1)[:, None],
            "caption_nll": self._caption_nll(state_BTH, inputs),
            "caption_tokens": inputs[CAPTION_LENGTH].to(vector_BH),
            "temperature": torch.exp(low + (high - low) * share).expand(len(rows_B)),
        }

    def grids(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(rows, columns, H) cells of each map (height, width, H): `cells.side` a side, or less where the map
        has fewer."""
        sizes = [self.cells.of_image(*each.shape[:2]) for each in maps]
        means = [mean_cells(each, *size).flatten(0, 1) for each, size in zip(maps, sizes, strict=True)]
        parts = self.pool(torch.cat(means), sizes).split([len(each) for each in means])
        return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]

    def _regions(self, grid: Tensor, boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H) one cell of each region, (N, cells, H) those of its prefix. boxes: shares of the image."""
        rows, columns = grid.shape[:2]
        boxes_N4 = boxes_N4 * boxes_N4.new_tensor([columns, rows, columns, rows])
        one, several = (
            roi_align(grid, boxes_N4, output_size=side, samples=rows * columns)
            for side in (1, self.cells.region_side)
        )
        return one[:, 0, 0], several.flatten(1, 2)

    def _caption_nll(self, state_BTH: Tensor, inputs: ModelInputs) -> Tensor:
        """(B,) sums over each caption's tokens. The state before a token says it, the last soft token's the
        first one."""
        lengths = inputs[CAPTION_LENGTH].tolist()
        if not any(lengths):  # a token that counts 0: the parameters take part in every chunk
            label_1 = torch.zeros(1, dtype=torch.int64, device=state_BTH.device)
            return self.lm_head(state_BTH[:1, 0], label_1).expand(len(lengths)) * 0
        places = [(row, each) for row, length in enumerate(lengths) for each in range(length)]
        rows_N, offsets_N = torch.tensor(places).to(state_BTH.device, non_blocking=True).unbind(dim=1)
        place_N = inputs[CAPTION_START][rows_N] + offsets_N
        nll_N = self.lm_head(state_BTH[rows_N, place_N - 1], inputs["input_ids"][rows_N, place_N])
        return torch.stack([part.sum() for part in nll_N.split(lengths)])
