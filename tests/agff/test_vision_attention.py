from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from agff import vision_attention
from agff.backbone import load_backbone
from agff.vision_attention import Segments, _varlen_takes_scale, attend_within_segments, has_varlen_kernel
from tests.agff.family_folders import BUILDERS
from tests.agff.test_families import CHUNKS, QWEN, our_model, processor_of

LENGTHS = ([5], [4, 4, 4], [4, 7, 4, 1, 7], [1, 2, 3], [3, 3, 2, 2])


def packed(num_patches: int, dtype: torch.dtype) -> list[Tensor]:
    """(1, heads, P, D), as the towers hand them over."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, 2, num_patches, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)
    ]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_loop(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """(1, P, heads, D): one call for each segment, as transformers does it."""
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [functional.scaled_dot_product_attention(*part, scale=scaling) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def with_gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("are_known", [True, False])
def test_segments_together_equal_one_call_for_each(
    lengths: list[int], dtype: torch.dtype, are_known: bool
) -> None:
    """To the last bit: each segment is computed alone in either. Without known lengths they are read from
    the boundaries."""
    inputs = packed(sum(lengths), dtype)
    known = (Segments([sum(lengths)]), Segments(lengths)) if are_known else ()
    output, _ = attend_within_segments(
        None,
        *inputs,
        None,
        scaling=0.3,
        cu_seq_lens_q=boundaries(lengths),
        max_length_q=max(lengths),
        segments=known,
    )
    expected = by_loop(*inputs, lengths, 0.3)
    for one, other in zip(with_gradients(output, inputs), with_gradients(expected, inputs), strict=True):
        assert torch.equal(one, other)


def test_lengths_that_are_together_are_not_moved() -> None:
    assert Segments([4, 4]).order_on(torch.device("cpu")) is None
    order, back = Segments([2, 1, 2]).order_on(torch.device("cpu")) or ()
    assert order.tolist() == [2, 0, 1, 3, 4]
    assert order[back].tolist() == list(range(5))
    assert Segments([2, 1, 2]).groups == ((1, 1), (2, 2))


def test_a_kernel_for_segments_of_any_length_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's, whose place is taken by a loop, since it needs a GPU: layout, boundaries and scale are
    right."""
    from torch.nn.attention import varlen

    calls = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, scale: float) -> Tensor:
        calls.append(lengths)
        cu_seq_q, cu_seq_k, *longest = lengths
        assert cu_seq_q is cu_seq_k
        assert longest == [7, 7]
        parts = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return by_loop(*parts, cu_seq_q.diff().tolist(), scale)[0]

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(vision_attention, "has_varlen_kernel", lambda query: True)
    lengths = [4, 7, 4, 1, 7]
    inputs = packed(sum(lengths), torch.float32)
    output, _ = attend_within_segments(
        None, *inputs, None, scaling=0.3, cu_seq_lens_q=boundaries(lengths), max_length_q=7
    )
    assert len(calls) == 1
    assert torch.equal(output, by_loop(*inputs, lengths, 0.3))


@pytest.mark.parametrize(
    ("change", "usable"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"shape": (1, 16, 9, 36)}, False),
        ({"shape": (1, 16, 9, 512)}, False),
        ({"is_cuda": False}, False),
        ({"capability": (7, 5)}, False),
        ({"cuda": None}, False),
        ({"module": None}, False),
        ({"kernel": lambda query, is_causal=False: query}, False),  # torch 2.10's has no scale
    ],
)
def test_the_kernel_is_used_where_it_works(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], usable: bool
) -> None:
    machine = {"capability": (8, 0), "cuda": "13.0"} | change
    query = {"shape": (1, 16, 9, 80), "dtype": torch.bfloat16, "is_cuda": True, "device": "cuda:0"} | change
    monkeypatch.setattr("torch.version.cuda", machine["cuda"])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: machine["capability"])
    monkeypatch.setattr(vision_attention, "_varlen_takes_scale", _varlen_takes_scale.__wrapped__)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", change.get("kernel", lambda *_, scale: None))
    if "module" in change:
        monkeypatch.setattr(vision_attention, "find_spec", lambda name: None)
    assert has_varlen_kernel(SimpleNamespace(**query)) == usable  # type: ignore[arg-type]


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sdpa_takes_it_for_towers_that_pack_images_and_nothing_of_it_is_saved(
    family: str, attention: str, tmp_path: Path
) -> None:
    BUILDERS[family](tmp_path / "backbone")
    model = load_backbone(tmp_path / "backbone", dtype=torch.float32, attention=attention)
    tower = model.visual if family in QWEN else model.vision_tower
    is_taken = attention == "sdpa" and family in QWEN
    assert tower.config._attn_implementation == (vision_attention.IMPLEMENTATION if is_taken else attention)
    assert model.language_model.config._attn_implementation == attention
    model.save_pretrained(tmp_path / "saved")
    saved = "".join(path.read_text() for path in (tmp_path / "saved").glob("*.json"))
    assert vision_attention.IMPLEMENTATION not in saved


def test_eager_attention_gives_the_same_embeddings(tmp_path: Path) -> None:
    """transformers' slow reference takes the same inputs."""
    for family in QWEN:
        folder = tmp_path / family
        BUILDERS[family](folder)
        inputs = processor_of(folder)(CHUNKS["mixed"])
        models = [our_model(folder, torch.float64, attention=name) for name in ("sdpa", "eager")]
        with torch.no_grad():
            embeddings = [model(inputs)["embedding"] for model in models]
        torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)  # eager's softmax is in float32
