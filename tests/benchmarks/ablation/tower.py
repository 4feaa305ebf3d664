"""A small model with the project's shape: one transformer for both sides, M prompts behind the content."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.ablation.scenes import ATTRIBUTES, Scenes, looks

PIXEL_NOISE = 0.2


class Tower(nn.Module):
    """Scenes and captions -> (B, M, D) unit vectors, vector 0 the global one.

    An image is one token for each occupied place, its pixels projected plus the place's vector; a caption one
    token for each object it names, the sum of its five words' vectors. As in a causal language model a
    prompt sees the content and the prompts before it, so the global vector is the same whatever K.
    """

    def __init__(self, *, num_fine: int, dim: int, width: int = 80, num_layers: int = 2, num_heads: int = 4):
        super().__init__()
        drawn = looks()
        self.register_buffer("looks", drawn.flatten(0, -2), persistent=False)
        self.pixels = nn.Linear(drawn.shape[-1], width)
        self.place = nn.Embedding(ATTRIBUTES["place"], width)
        self.words = nn.Embedding(sum(ATTRIBUTES.values()), width)
        self.prompts_MH = nn.Parameter(torch.randn(1 + num_fine, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim, bias=False)
        counts = torch.tensor([0, *ATTRIBUTES.values()])[:-1]
        self.register_buffer("first_word", counts.cumsum(0), persistent=False)

    def images(self, scenes: Scenes, generator: torch.Generator) -> Tensor:
        """Vectors of the scenes' images, drawn with noise of the generator."""
        return self._encode(*self._image_tokens(scenes, generator))

    def captions(self, scenes: Scenes) -> Tensor:
        """Vectors of the scenes' captions."""
        return self._encode(*self._caption_tokens(scenes))

    def both(self, scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(captions, images), in one forward."""
        sides = zip(self._caption_tokens(scenes), self._image_tokens(scenes, generator), strict=True)
        captions, images = self._encode(*(torch.cat(pair) for pair in sides)).chunk(2)
        return captions, images

    def _image_tokens(self, scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        things_BO5 = torch.from_numpy(scenes.things).clamp(min=0)
        colour, shape, size, orientation, place = things_BO5.unbind(dim=-1)
        index = colour
        for name, value in {"shape": shape, "size": size, "orientation": orientation}.items():
            index = index * ATTRIBUTES[name] + value
        pixels_BOP = self.looks[index]
        pixels_BOP = pixels_BOP + PIXEL_NOISE * torch.randn(pixels_BOP.shape, generator=generator)
        return self.pixels(pixels_BOP) + self.place(place), torch.from_numpy(scenes.present)

    def _caption_tokens(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        words_BO5 = torch.from_numpy(scenes.things).clamp(min=0) + self.first_word
        return self.words(words_BO5).sum(dim=2), torch.from_numpy(scenes.named)

    def _encode(self, content_BOH: Tensor, is_there_BO: Tensor) -> Tensor:
        num_rows, num_content = is_there_BO.shape
        num_vectors = len(self.prompts_MH)
        states = torch.cat([content_BOH, self.prompts_MH.expand(num_rows, -1, -1)], dim=1)
        sees = torch.ones(num_content + num_vectors, num_content + num_vectors, dtype=torch.bool).tril()
        sees[:num_content, :num_content] = True
        keys = torch.cat([is_there_BO, torch.ones(num_rows, num_vectors, dtype=torch.bool)], dim=1)
        for block in self.blocks:
            states = block(states, (sees & keys[:, None])[:, None])
        return functional.normalize(self.project(self.norm(states[:, num_content:])), dim=-1)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_in = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, states_BTH: Tensor, sees_B1TT: Tensor) -> Tensor:
        heads = self.qkv(self.norm_in(states_BTH)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=sees_B1TT)
        states_BTH = states_BTH + self.out(mixed.transpose(1, 2).flatten(2))
        return states_BTH + self.mlp(states_BTH)
