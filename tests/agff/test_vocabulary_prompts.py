"""Soft tokens as rows of the vocabulary: which rows they take, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from agff.errors import ConfigError
from agff.lazy_tensor import of_tensor
from agff.prompts import PromptConfig
from agff.vocabulary_prompts import add_to_vocabulary
from tests.drawings import tiny_backbone


@pytest.mark.parametrize(("spare", "grown"), [(0, 6), (2, 4), (6, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_takes_the_soft_tokens(tmp_path: Path, spare: int, grown: int, dtype: torch.dtype) -> None:
    tiny_backbone(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    size = len(tokenizer)
    config.get_text_config().vocab_size = size + spare
    vocabulary = add_to_vocabulary(tokenizer, config, PromptConfig(num_fine=2, tokens_per_prompt=2))
    assert vocabulary.ids == tuple(range(size, size + 6))
    assert vocabulary.vector_ids == [size + 1, size + 3, size + 5]
    assert vocabulary.vocabulary_size == config.get_text_config().vocab_size == size + spare + grown
    assert tokenizer(vocabulary.whole_text).input_ids == list(vocabulary.ids)
    assert tokenizer(f"a{vocabulary.global_text}").input_ids[1:] == [size, size + 1]
    table_VH, vectors_PH = torch.randn(size + spare, 4, dtype=dtype), torch.randn(6, 4)
    before_VH = table_VH.clone()
    rows = max(len(table_VH), vocabulary.vocabulary_size)
    found_VH = vocabulary.put_into(of_tensor(table_VH).grown(rows, dtype=dtype), vectors_PH)
    assert torch.equal(table_VH, before_VH)
    assert found_VH.dtype == dtype
    assert len(found_VH) == size + spare + grown
    assert torch.equal(found_VH[:size], table_VH[:size])
    assert torch.equal(found_VH[size : size + 6], vectors_PH.to(dtype))
    assert torch.equal(found_VH[size + 6 :], table_VH[size + 6 :])


def test_a_later_stage_takes_the_rows_of_the_earlier_one(tmp_path: Path) -> None:
    """Its tokenizer has their tokens already."""
    tiny_backbone(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    size = len(tokenizer)
    first = add_to_vocabulary(tokenizer, config, PromptConfig(num_fine=1))
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for num_fine in (1, 0, 3):
        later = add_to_vocabulary(tokenizer, config, PromptConfig(num_fine=num_fine))
        assert later.ids == tuple(range(size, size + 1 + num_fine))
    assert later.ids[:2] == first.ids
    assert config.get_text_config().vocab_size == size + 4


def test_an_id_that_means_something_to_the_backbone_is_not_taken(tmp_path: Path) -> None:
    tiny_backbone(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    config.video_token_id = len(tokenizer) + 1
    with pytest.raises(ConfigError, match=rf"no token for \[{len(tokenizer) + 1}\], which mean something"):
        add_to_vocabulary(tokenizer, config, PromptConfig(num_fine=2))
